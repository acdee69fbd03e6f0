"""Diffusion transformers whose experts are routed by the timestep, trained with DeepSpeed expert parallelism."""

__version__ = "0.1.0"


def __getattr__(name: str):  # torch and deepspeed take seconds to import: a program's --help should not
    if name == "build_model":
        from switchdit.models import build_model

        return build_model
    if name == "load_reference_checkpoint":
        from switchdit.engine.reference_checkpoints import load_reference_checkpoint

        return load_reference_checkpoint
    raise AttributeError(f"module 'switchdit' has no attribute '{name}'")


__all__ = ["__version__", "build_model", "load_reference_checkpoint"]
