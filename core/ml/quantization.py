"""How a base model may be held in memory: what a job says of it. No torch."""

from typing import Literal

from pydantic import BaseModel, ConfigDict


class Part(BaseModel):
    """A part of a job's spec: unknown fields and infinite numbers are errors."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True)


class Quantization(Part):
    """The frozen base model's precision. 16 bits mean no quantisation: plain LoRA; `type` and `double_quant`
    are about 4 bits alone."""

    bits: Literal[4, 8, 16] = 4
    type: Literal["nf4", "fp4"] = "nf4"
    double_quant: bool = True
    compute_dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
