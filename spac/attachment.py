"""Attach spac to a transformers model, and take it off again."""

from __future__ import annotations

import copy
import functools
import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized
from transformers import PreTrainedModel

import spac.hf  # noqa: F401  (registers the backend)
from spac.budget import Budget, bytes_for_ratio, plan_budget
from spac.config import SpacConfig, parse_bytes
from spac.cores import set_ffn_threads
from spac.cost import CostModel, measure
from spac.engine import Engine
from spac.experts import (
    Experts,
    UnsupportedLayout,
    expert_layout,
    expert_parameters,
    find_experts,
    router_top_k,
    stored_layout,
)
from spac.layout import ExpertLayout
from spac.profile import Profile, find_profile, machine_name
from spac.progress import progress
from spac.store import HostStore
from spac.trace import Trace

_SHOW_FROM = 4 << 30  # bytes of experts from which moving them takes seconds


class _NotCopied:
    """Refuses to be copied, which is how whoever copies or stores the model is told."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise RuntimeError(
            "spac: an attached model cannot be copied or pickled; call spac.detach(model) first"
        )


class Binding(_NotCopied):
    """Tells an experts module which engine runs it, as which layer."""

    def __init__(self, engine: Engine, layer: int, module: Any) -> None:
        self.engine, self.layer = engine, layer
        self._weights = _fingerprint(module)

    def check(self, module: Any) -> None:
        """RuntimeError if the weights are not those of the host store any more: slots hold copies
        of these."""
        if _fingerprint(module) != self._weights:
            raise RuntimeError(
                f"spac: the experts of layer {self.layer} were moved, converted or changed while "
                "the model was attached; call spac.detach(model), then attach again"
            )


def _fingerprint(module: Any) -> list[tuple[int, int]]:
    """Changes when the parameters of experts are given other memory, or are written to."""
    parameters = expert_parameters(module).values()
    try:
        return [(p.data_ptr(), p._version) for p in parameters]
    except RuntimeError:  # made in inference mode: torch does not count what is written
        return [(p.data_ptr(), 0) for p in parameters]


@dataclass
class Attachment(_NotCopied):
    """What `attach` changed on a model, for `detach` and `stats`."""

    experts: list[tuple[str, Experts]]
    budget: Budget | None = None
    store: HostStore | None = None  # None: the experts stay where they are
    engine: Engine | None = None
    configs: list[Any] = field(default_factory=list)  # those of the experts, where replaced
    home: torch.device | None = None  # of all parameters
    devices: dict[str, torch.device] = field(default_factory=dict)
    # Kept as they are: while attached, adapters change the names and new embeddings the objects.
    requires_grad: dict[str, tuple[nn.Parameter, bool]] = field(default_factory=dict)
    hooks: list[Any] = field(default_factory=list)
    draft: tuple[PreTrainedModel, torch.device] | None = None
    last_generation: Any = None
    # spac.target.StaticTarget of the target and the draft, by id of the model, or why there is none
    targets: dict[int, Any] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    orphan: weakref.finalize | None = None  # stops the engine of a model that was dropped

    @contextmanager
    def in_use(self, what: str) -> Iterator[None]:
        """Whoever generates or detaches has the model for itself; RuntimeError for others."""
        if not self.lock.acquire(blocking=False):
            raise RuntimeError(f"spac: {what}: this model is generating; wait for it or stop it")
        try:
            if self.engine is not None:
                self.engine.owner = threading.get_ident()
            yield
        finally:
            if self.engine is not None:
                self.engine.owner = None
            self.lock.release()


def attachment(model: PreTrainedModel) -> Attachment | None:
    """The model's attachment, or None."""
    return model.__dict__.get("_spac_attachment")


@torch.inference_mode(False)  # what is made here is used outside of it as well
def attach(
    model: PreTrainedModel,
    gpu_budget: int | str | None = None,
    *,
    draft: PreTrainedModel | None = None,
    device: str | torch.device | None = None,
    profile: Profile | Trace | str | os.PathLike[str] | None = None,
    **settings: Any,
) -> PreTrainedModel:
    """Run the experts of `model` through spac within `gpu_budget` bytes of GPU memory.

    model: a transformers causal LM with experts, on the CPU or one GPU. gpu_budget: all GPU bytes
    that model, draft, KV cache and slots may take ("8GiB" or a number); None gives every expert a
    slot on a GPU, and on a machine without one runs the CPU kernels directly, with no slots.
    draft: a draft model that will be used and must fit the budget too; it moves to the device.
    device: where the slots are; default "cuda" if there is one. profile: what an earlier run
    learned (`spac.save_profile`) or a routing trace of this model, or the file of either; the
    experts that it used most fill the slots first. settings: see `spac.config.SpacConfig`.
    With weights="int8" or "int4" the experts are quantised on the way into the host store
    (`spac.quantize` states the error): answers change, scheduling still does not change them, and
    `detach` gives the rounded weights back.
    Returns `model`, whose parameters no longer require gradients until `spac.detach(model)`.
    Raises ValueError (already attached, no experts, a budget too small, an unsupported layout by
    name, a profile of another model).
    """
    config = SpacConfig(**settings)
    if not isinstance(model, nn.Module):
        raise ValueError(f"attach: a transformers model is needed, got {type(model).__name__}")
    if attachment(model) is not None:
        raise ValueError("attach: this model is attached already; call spac.detach(model) first")
    experts = find_experts(model)
    if not experts:
        raise ValueError(f"attach: {type(model).__name__} has no Mixture-of-Experts layers")
    if not hasattr(model, "config"):
        raise ValueError(f"attach: a transformers model is needed, got {type(model).__name__}")
    sources = [expert_layout(module) for _, module in experts]
    layouts = [stored_layout(module, config) for _, module in experts]
    if len({layout.num_experts for layout in layouts}) > 1:
        raise UnsupportedLayout(f"{type(model).__name__}: layers with different numbers of experts")
    _check_devices(model)
    shape = (len(layouts), layouts[0].num_experts, router_top_k(model))
    known = None if profile is None else find_profile(profile, *shape)
    target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if target.type == "cuda" and target.index not in (None, torch.cuda.current_device()):
        raise ValueError(
            f"attach: device {target} is not torch's current one, on which kernels run; "
            f"call torch.cuda.set_device({target.index}) first"
        )
    quantized = config.weights != "float"
    if target.type == "cpu" and gpu_budget is None and not quantized:
        _take_over(model, Attachment(experts), quantized=False)
        return model
    total = None if gpu_budget is None else parse_bytes(gpu_budget)
    if target.type == "cpu" and total is None:
        total = bytes_for_ratio(model, 0.0, config, draft)  # slots would be copies
    if any(is_parametrized(module) for _, module in experts):
        raise UnsupportedLayout(
            f"{type(model).__name__}: its experts have parametrized weights; make them plain first"
        )
    parameters = [expert_parameters(module) for _, module in experts]
    expert_ids = {id(p) for layer in parameters for p in layer.values()}
    budget = plan_budget(model, total, config, draft)
    store = HostStore(layouts, target.type == "cuda", sources)
    state = Attachment(experts, budget, store)
    named = dict(model.named_parameters())
    state.home = next(iter(named.values())).device
    state.devices = {n: t.device for n, t in (*named.items(), *model.named_buffers())}
    state.requires_grad = {n: (p, p.requires_grad) for n, p in named.items()}
    # First: whatever happens from here on, `detach` can undo it.
    model.__dict__["_spac_attachment"] = state
    try:
        experts_bytes = sum(p.nbytes for layer in parameters for p in layer.values())
        for layer in progress(parameters, "host store", show=experts_bytes > _SHOW_FROM):
            store.adopt(layer)
        set_ffn_threads(config.cpu_threads, target.type == "cuda")
        costs = _costs(layouts[0], target, known)
        first = None if known is None else known.rate
        state.engine = Engine(store, budget.slots, shape[2], target, config, costs, first)
        if known is not None:
            state.engine.control.warm_start(known)
            state.engine.utility.copy_(torch.from_numpy(known.utility))
        _move_dense(model, target, {}, expert_ids)
        if draft is not None:
            state.draft = (draft, next(draft.parameters()).device)
            _move_dense(draft, target, {}, set())
        state.engine.start()
        state.orphan = weakref.finalize(model, _close_beside, state.engine)
        state.orphan.atexit = False  # the engine sees to that itself
        model.requires_grad_(False)
        for index, (_, module) in enumerate(experts):
            module.__dict__["_spac_binding"] = Binding(state.engine, index, module)
        _take_over(model, state, quantized)
    except BaseException:
        detach(model)
        raise
    return model


def _take_over(model: PreTrainedModel, state: Attachment, quantized: bool) -> None:
    """Let spac run the experts, and refuse what would miss where their weights are now."""
    for _, module in state.experts:
        # A config of their own: the model's may be shared with another model, and transformers'
        # set_experts_implementation passes by classes that are not in the file of their experts.
        state.configs.append(module.config)
        module.config = copy.copy(module.config)
        module.config._experts_implementation = {"": "spac"}
        if state.engine is not None:
            state.hooks.append(module.register_load_state_dict_pre_hook(_refuse_load))
        if quantized:
            refuse = functools.partial(_refuse, "state_dict")
            state.hooks.append(module.register_state_dict_pre_hook(refuse))
    if state.engine is not None:  # its weights in the store are strided, or quantised
        model.__dict__["save_pretrained"] = functools.partial(_refuse, "save_pretrained")
    model.__dict__["_spac_attachment"] = state


def _refuse(what: str, *_: Any, **__: Any) -> None:
    raise RuntimeError(
        f"spac: {what}: spac holds the experts of an attached model; call spac.detach(model) first"
    )


def _refuse_load(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """For weights of experts: their copies in slots would stay as they are."""
    if any(name.startswith(prefix) for name in state_dict):
        _refuse("load_state_dict")


def _close_beside(engine: Engine) -> None:
    """Close it in a thread: a collector may run in any, also in one that `close` waits for."""
    threading.Thread(target=engine.close, name="spac-close", daemon=True).start()


def _costs(layout: ExpertLayout, device: torch.device, profile: Profile | None) -> CostModel:
    """Those of the profile if they were measured here, for experts of this size."""
    costs = None if profile is None or profile.machine != machine_name() else profile.costs
    if costs is not None and costs.expert_bytes == layout.blob_bytes:
        return costs
    return _measured(layout, device)


@functools.cache
def _measured(layout: ExpertLayout, device: torch.device) -> CostModel:
    return measure(layout, device, limit_s=2.0)


@torch.inference_mode(False)
def detach(model: PreTrainedModel) -> PreTrainedModel:
    """Undo `attach`: weights, devices, gradients and experts implementation as they were.

    Raises ValueError if the model is not attached, RuntimeError while it generates.
    """
    state = attachment(model)
    if state is None:
        raise ValueError("detach: this model is not attached")
    with state.in_use("detach"):
        _undo(model, state)
        del model.__dict__["_spac_attachment"]  # last: interrupted before, detach can be repeated
    return model


def _undo(model: PreTrainedModel, state: Attachment) -> None:
    """Stop the engine and give everything back, as far as attach, or a detach that was interrupted,
    had come."""
    _give_over(model, state)
    store = state.store
    if store is None:
        return
    if state.engine is not None:
        state.engine.close()
    if state.orphan is not None:
        state.orphan.detach()
    assert state.home is not None
    for layer, (_, module) in enumerate(state.experts[: len(store.blobs)]):
        store.restore(layer, expert_parameters(module), state.home)
    _move_dense(model, state.home, state.devices, set())
    if state.draft is not None:
        draft, device = state.draft
        _move_dense(draft, device, {}, set())
    known = {id(parameter): flag for parameter, flag in state.requires_grad.values()}
    for name, parameter in model.named_parameters():
        with _own_mode(parameter):
            if id(parameter) in known:
                parameter.requires_grad_(known[id(parameter)])
            elif name in state.requires_grad:
                parameter.requires_grad_(state.requires_grad[name][1])
    store.close()


def _give_over(model: PreTrainedModel, state: Attachment) -> None:
    """Undo `_take_over`, as far as it had come."""
    for (_, module), config in zip(state.experts, state.configs, strict=False):
        module.config = config
    for _, module in state.experts:
        module.__dict__.pop("_spac_binding", None)
    for hook in state.hooks:
        hook.remove()
    model.__dict__.pop("save_pretrained", None)


def _own_mode(parameter: nn.Parameter) -> torch.inference_mode:
    """Where a parameter may change: in torch's inference mode if it was made there, else outside.
    With data of the other kind torch can no longer make views of it."""
    return torch.inference_mode(parameter.is_inference())


def _move_dense(
    model: PreTrainedModel,
    device: torch.device,
    devices: dict[str, torch.device],
    leave: set[int],
) -> None:
    """Parameters and buffers to their entry in `devices`, others to `device`."""
    for name, parameter in model.named_parameters():
        if id(parameter) not in leave:
            with _own_mode(parameter):
                parameter.data = parameter.data.to(devices.get(name, device))
    for name, buffer in list(model.named_buffers()):
        owner, _, leaf = name.rpartition(".")
        moved = buffer.to(devices.get(name, device))
        model.get_submodule(owner)._buffers[leaf] = moved


def _check_devices(model: PreTrainedModel) -> None:
    if any(hasattr(p, "device_mesh") for p in model.parameters()):
        raise ValueError("attach: the model's parameters are sharded (DTensor); give it whole ones")
    devices = {p.device for p in model.parameters()}
    if torch.device("meta") in devices or len(devices) > 1:
        raise ValueError(
            f"attach: the model must be on one device, its parameters are on "
            f"{', '.join(sorted(map(str, devices)))}; load it without device_map"
        )
