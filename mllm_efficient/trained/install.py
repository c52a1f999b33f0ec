"""Puts a method's parts into a model and takes them out again: a trained projector, language-model weights, decoder hooks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ..compressors.base import Compressor
from ..compressors.composed import inside_of
from ..errors import UnsupportedModelError
from .folder import MARK, Parts, held, mark, parts_of


class Undo:
    """What ``install`` changed; calling it puts everything back, on the device and in the dtype the model has by then."""

    def __init__(self) -> None:
        self.parts = list[tuple[dict[str, Any], str, Any]]()

    def put(self, store: dict[str, Any], name: str, value: Any) -> None:
        self.parts.append((store, name, store.get(name)))
        store[name] = value

    @property
    def offloaded(self) -> bool:
        """Whether weights that were swapped in one by one were offloaded since: their module's hook brings them back at every call."""
        return any(isinstance(old, Tensor) and store[name] is not None and store[name].is_meta for store, name, old in self.parts)

    def __call__(self) -> None:
        for store, name, old in reversed(self.parts):
            if old is None:
                del store[name]
                continue
            now = next(store[name].parameters()) if isinstance(old, nn.Module) else store[name]
            if isinstance(old, nn.Module):
                old.train(store[name].training)
            if not now.is_meta:  # offloaded since: the old part stays where it is
                _follow(old, now)
            store[name] = old
        self.parts.clear()

    def _named(self, model: Any) -> dict[str, Any]:
        """What was taken out by its full name in the model; None where there was nothing."""
        of_store: dict[int, list[tuple[str, Any]]] = {}
        for store, name, old in self.parts:
            of_store.setdefault(id(store), []).append((name, old))
        out = dict[str, Any]()
        for path, module in model.named_modules():
            for store in (module._modules, module._parameters):
                out |= {f"{path}.{name}" if path else name: old for name, old in of_store.get(id(store), [])}
        return out

    def part_of(self, model: Any) -> tuple[str, nn.Module | None, nn.Module]:
        """The full name of the projector or router that was put in, what was there before, and what is there now."""
        ((name, old),) = ((name, old) for name, old in self._named(model).items() if not isinstance(old, Tensor))
        return name, old, model.get_submodule(name)

    def tensors_of(self, model: Any) -> dict[str, Tensor]:
        """The weights of the language model that were taken out, by their full names."""
        return {name: old.detach() for name, old in self._named(model).items() if isinstance(old, Tensor)}

    def originals(self, model: Any) -> dict[str, Tensor]:
        """Every weight that was taken out, by its full name."""
        if not self.parts:
            return {}
        name, old, _ = self.part_of(model)
        return self.tensors_of(model) | ({} if old is None else {f"{name}.{key}": value for key, value in old.state_dict().items()})


def _follow(old: Any, now: Tensor) -> None:
    """Takes a part to where a tensor is."""
    if isinstance(old, nn.Module):
        old.to(now.device, now.dtype if next(old.parameters()).is_floating_point() else None)
    elif (old.device, old.dtype) != (now.device, now.dtype):
        old.data = old.data.to(now.device, now.dtype)


def install(adapter: Any, method: Compressor, parts: Parts | None = None) -> Undo:
    """Puts a trained method's parts into a model: its projector or router, and the language-model weights trained with it.

    Weights are swapped by reference. parts: what to put in, if it is there already. A method without trained parts changes
    nothing, nor does one whose parts the model holds.
    """
    undo, part = Undo(), method.installs
    if part is None:
        return undo
    if held(adapter) == mark(part):
        return undo
    if held(adapter) is not None:
        raise UnsupportedModelError(f"the model holds {held(adapter)} already: unwrap it first")
    owner, name = adapter.slot(part)
    parts = parts or parts_of(adapter, part)
    try:
        undo.put(owner._modules, name, parts.module.train(owner.training))
        for full_name, value in parts.delta.items():
            path, _, leaf = full_name.rpartition(".")
            store = adapter.model.get_submodule(path)._parameters
            undo.put(store, leaf, nn.Parameter(value, requires_grad=store[leaf].requires_grad))
        _tie(adapter.model, undo)
    except BaseException:
        undo()
        raise
    parts.module.__dict__[MARK] = mark(part)
    return undo


@contextlib.contextmanager
def inside(adapter: Any) -> Iterator[None]:
    """The hooks of in-decoder methods on the model."""
    adapter.reach_inside()
    try:
        yield
    finally:
        adapter.let_go_inside()


@contextlib.contextmanager
def installed(model: Any, method: Compressor | None, kept: dict[str, Parts] | None = None) -> Iterator[None]:
    """What a method puts into a model, inside the block: the parts of a trained one, the hooks of one in the decoder.

    Nothing for a method that has none or a model that holds them. kept: parts that were read before, by ``mark``; those
    that are read now are added.
    """
    from ..patches import adapter_for

    adapter, part = adapter_for(model), None if method is None else method.installs
    with inside(adapter) if method is not None and inside_of(method) is not None else contextlib.nullcontext():
        if method is None or part is None or held(adapter) is not None:
            yield
            return
        kept = {} if kept is None else kept
        if mark(part) not in kept:
            kept[mark(part)] = parts_of(adapter, part)
        undo = install(adapter, method, kept[mark(part)])
        try:
            yield
        finally:
            undo()


def _tie(model: Any, undo: Undo) -> None:
    """A head that is tied to the embedding follows it."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and any(store is embedding._parameters and old is head._parameters["weight"] for store, _, old in undo.parts)
    if tied:
        undo.put(head._parameters, "weight", embedding._parameters["weight"])
