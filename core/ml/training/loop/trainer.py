"""trl's trainer, in which a bad step changes nothing, and the loss of rows is that of their tokens."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import DataLoader, RandomSampler
from trl import SFTTrainer

from core.ml.training import ranks
from core.ml.training.data import LabelledIds
from core.ml.training.files import saving
from core.ml.training.loop.guard import Watchdog


class Trainer(SFTTrainer):
    """`watchdog` judges every step before the optimizer takes it; without one every step is taken.

    `rows`: how many of the training rows are not there to make all ranks' batches full.
    """

    watchdog: Watchdog | None = None
    rows = 0
    _batches: Sequence[Any] = ()
    _step_loss = 0.0
    _skipped = False

    def _send_telemetry(self) -> None:
        """Nobody is told: trl tells the hub of every training otherwise."""

    def loss_on(self, examples: Sequence[LabelledIds]) -> float:
        """The mean loss of the trained tokens of these rows; in no log, and of no account for the best step."""
        evened = ranks.evened(list(examples), self.args.eval_batch_size)
        rows = self.get_eval_dataloader(Dataset.from_list(evened))
        output = self.evaluation_loop(rows, description="Evaluation", prediction_loss_only=True)
        return float(output.metrics["eval_loss"])

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return (
            RandomSampler(range(self.rows))
            if ranks.count() > 1
            else super()._get_train_sampler(train_dataset)
        )

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The rows in the order that one process would take them in, a batch for each rank in turn."""
        loader = super().get_train_dataloader()
        if ranks.count() > 1:
            loader.set_sampler(ranks.Evened(loader.get_sampler(), self.rows, len(self.train_dataset)))
        return loader

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        self._batches, items = super().get_batch_samples(*args, **kwargs)
        self._step_loss = 0.0
        return self._batches, items

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss: torch.Tensor = super().training_step(*args, **kwargs)
        self._step_loss += loss.item()
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """The last thing before the optimizer's step: here a bad one loses its gradients, so that nothing moves."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        step = self.state.global_step + 1
        self._skipped = self.watchdog is not None and self.watchdog.skips(
            step, self._batches, ranks.mean(self._step_loss), float(norm), fp16=self.args.fp16
        )
        if self._skipped:
            model.zero_grad()
            self._tr_loss.zero_()
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self._skipped and "learning_rate" in logs:
            logs = {name: value for name, value in logs.items() if name not in ("loss", "grad_norm")}
        super().log(logs, start_time)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """As the library's, but its mean of the batches' means would change with the batch size."""
        self._total = torch.zeros(3, dtype=torch.float64)
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        loss, tokens, read = self.accelerator.reduce(self._total.to(self.args.device), "sum").tolist()
        output.metrics[f"{metric_key_prefix}_loss"] = loss / max(tokens, 1)
        output.metrics[f"{metric_key_prefix}_tokens"] = read
        return output

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        labels = inputs["labels"][..., 1:]
        result = super().prediction_step(model, inputs, *args, **kwargs)
        tokens = int((labels >= 0).sum())
        read = (
            int(inputs["attention_mask"].sum()) if "attention_mask" in inputs else inputs["input_ids"].numel()
        )
        sums = [float(result[0]) * tokens, tokens, read]
        self._total += torch.tensor(sums, dtype=torch.float64)
        return result

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the library's, which would gather the base model too where the processes share it."""
        if self.is_fsdp_enabled:
            saving.write(self.model, Path(output_dir or self.args.output_dir))
        else:
            super().save_model(output_dir, _internal_call)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Moments and position are the checkpoint's, rates those of this run: a checkpoint keeps the old ones too."""
        settings = [
            {name: value for name, value in group.items() if name != "params"}
            for group in self.optimizer.param_groups
        ]
        super()._load_optimizer_and_scheduler(checkpoint)
        scheduler = self.lr_scheduler
        scheduler.base_lrs = [group["initial_lr"] for group in settings]
        factors = [factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas]
        rates = [rate * factor for rate, factor in zip(scheduler.base_lrs, factors, strict=True)]
        scheduler._last_lr = rates
        for group, fresh, rate in zip(self.optimizer.param_groups, settings, rates, strict=True):
            group.update(fresh)
            group["lr"] = rate
