"""Adapters: LoRA weights in a frozen model, of which one is on, or none."""

from __future__ import annotations

import warnings
import weakref
from collections import deque
from typing import Any

from torch import nn

# A switch that was interrupted: some layers have the adapter on, others have not.
_BETWEEN = "between two adapters"


class AdapterName(str):
    """Name of LoRA weights that leave the model some time after the last reference to it."""


class Adapters:
    """LoRA weights by name, switched off except while the model runs with one of them.

    Not safe to share between threads: the owner of the model locks it.

    Args:
        model: An HF model without adapters.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._parameters: dict[str, list[tuple[str, nn.Parameter]]] = {}
        self._on: str | None = None
        # Names without references: finalizers run anywhere, so they only note them.
        self._unused: deque[str] = deque()

    @property
    def on(self) -> str | None:
        """Name of the adapter that is on."""
        return None if self._on == _BETWEEN else self._on

    def add(self, name: str, config: Any) -> list[tuple[str, nn.Parameter]]:
        """Adds LoRA weights, switched off; see `Generator.add_adapter`."""
        self.delete_unused()
        plain = str(name)  # peft keeps it, which must be no reference to an AdapterName
        if plain in self._parameters:
            raise ValueError(f"the model already has an adapter {plain!r}; choose another name")
        self._on = _BETWEEN
        try:
            with warnings.catch_warnings():
                # peft warns of a second adapter; here each compressor has one.
                warnings.filterwarnings("ignore", "Already found a `peft_config`", UserWarning)
                self._model.add_adapter(config, adapter_name=plain)
            parameters = [
                (path.replace(f".{plain}.", "."), parameter)
                for path, parameter in self._model.named_parameters()
                if f".{plain}." in path
            ]
            for _, parameter in parameters:
                # In bfloat16 small training steps would be lost.
                parameter.data = parameter.data.float()
            self._parameters[plain] = parameters
        except BaseException:
            # Refused, or interrupted in the middle of the model's layers.
            self._delete(plain)
            raise
        finally:
            self.switch(None)
        if isinstance(name, AdapterName):
            weakref.finalize(name, self._unused.append, plain).atexit = False
        return parameters

    def switch(self, adapter: str | None) -> None:
        """Switches an adapter on and all others off; one that was interrupted is repeated."""
        if adapter == self._on:
            return
        self._on = _BETWEEN
        if adapter is None:
            if self._parameters:
                self._model.disable_adapters()
        else:
            self._model.set_adapter(str(adapter))
            self._model.enable_adapters()
        # peft stops the gradients of those that are off, even of a pass before its backward pass.
        for parameters in self._parameters.values():
            for _, parameter in parameters:
                parameter.requires_grad_(True)
        self._on = adapter

    def delete_unused(self) -> None:
        """Deletes the weights of compressors that no longer exist."""
        while self._unused:
            self._delete(self._unused[0])
            self._unused.popleft()

    def _delete(self, name: str) -> None:
        from peft.functional import delete_adapter  # takes a second to import

        model = self._model
        with warnings.catch_warnings():
            # All are off, so it does not matter which one peft makes active.
            warnings.filterwarnings("ignore", f"Adapter {name} was active", UserWarning)
            delete_adapter(model, adapter_name=name, prefix="lora_")
        configs = getattr(model, "peft_config", {})
        configs.pop(name, None)
        self._parameters.pop(name, None)
        if not self._parameters:
            # As it was before the first: transformers sets both before peft has refused one.
            model.__dict__.pop("peft_config", None)
            model._hf_peft_config_loaded = False
