import os

# Before anything imports huggingface_hub: trl tells the hub of every training otherwise.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
