"""GGUF files for llama.cpp and its kin: a quantized model as it is, or an adapter as a LoRA."""

from .lora import export_gguf_lora as export_gguf_lora
from .model import export_gguf as export_gguf
