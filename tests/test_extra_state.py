"""Plain values in the state_dict: what is saved, what is refused, and what the errors say."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from pyro_snf.extra_state import SavesAttributes, saved_count, saved_number, saved_record
from tests.registry import CASES, LOG_DETS, conv, free_form, linear, train


class Saved(SavesAttributes):
    saved_attributes: ClassVar = {
        "count": saved_count,
        "error": saved_number,
        "name": lambda name, value: value,
        "nested": saved_record({"count": saved_count, "errors": lambda name, value: value}),
    }

    def __init__(self) -> None:
        super().__init__()
        self.count, self.error, self.name = 0, math.nan, None
        self.nested: dict[str, Any] = {"count": 0, "errors": ()}

    def values(self) -> list[object]:
        return [self.count, self.error, self.name, self.nested]


def written(values: object, version: object = 1) -> Tensor:
    return as_bytes(json.dumps({"format": version, "values": values}, separators=(",", ":")))


def as_bytes(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


# --- Round trips --------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [0.1, 5e-324, math.inf, -math.inf, math.nan, 1e308, 3])
@pytest.mark.parametrize("count", [0, 7, 2**63 - 1])
def test_values_are_saved_exactly(count: int, error: float) -> None:
    saved, loaded = Saved(), Saved()
    saved.count, saved.error, saved.name = count, error, "Θ\n"
    saved.nested = {"count": count, "errors": (error, None, [])}
    state = saved.state_dict()
    loaded.load_state_dict(copy.deepcopy(state))
    assert repr(loaded.values()[:3]) == repr([count, float(error), "Θ\n"])
    assert repr(loaded.nested["errors"]) == repr([error, None, []])
    assert torch.equal(loaded.state_dict()["_extra_state"], state["_extra_state"])


def test_what_cannot_be_saved_is_an_error_when_it_is_saved() -> None:
    module = Saved()
    module.count = torch.tensor(3)
    with pytest.raises(ValueError, match=r"expected count, an integer >= 0; got tensor\(3\)"):
        module.state_dict()


def test_state_is_on_the_cpu_whatever_the_default_device() -> None:
    with torch.device("meta"):
        state = Saved().state_dict()
    Saved().load_state_dict(state)


@pytest.mark.filterwarnings("ignore:torch.distributed is:UserWarning")
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")  # older torch's own
@pytest.mark.parametrize(
    "name", ["linear refined", "conv refined", "free form learned", "autoregressive"]
)
def test_files_of_whole_models(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    for save, load in [
        (safetensors.torch.save_model, safetensors.torch.load_model),
        (save_by_dcp, load_by_dcp),
    ]:
        model = nn.ModuleDict({"flow": case.make()})
        train(model["flow"], case)
        other = nn.ModuleDict({"flow": case.make(seed=1)})
        save(model, str(tmp_path / save.__name__))
        load(other, str(tmp_path / save.__name__))
        assert train(other["flow"], case, seed=9) == train(model["flow"], case, seed=9)


def save_by_dcp(model: nn.Module, path: str) -> None:
    dcp.save(model.state_dict(), checkpoint_id=path, no_dist=True)


def load_by_dcp(model: nn.Module, path: str) -> None:
    state = model.state_dict()
    dcp.load(state, checkpoint_id=path, no_dist=True)  # in place: the lengths have to be equal
    model.load_state_dict(state)


# --- Errors -------------------------------------------------------------------------------------

BROKEN: list[tuple[object, str]] = [
    ({}, "a tensor; got dict"),
    ({"count": 3}, "a tensor; got dict"),
    (None, "a tensor; got NoneType"),
    ("count", "a tensor; got str"),
    (torch.zeros(512), "a tensor of bytes, torch.uint8 and one-dimensional; got torch.float32 of "),
    (written({}).float(), "a tensor of bytes, torch.uint8 and one-dimensional; got torch.float32"),
    (written({})[None], "a tensor of bytes, .*; got torch.uint8 of shape (1, "),
    (written({}).to("meta"), "a tensor of bytes, .* on device meta"),
    (torch.zeros(0, dtype=torch.uint8), "JSON; got "),
    (as_bytes("{"), "JSON; got "),
    (as_bytes("[" * 100_000), "JSON; got "),
    (as_bytes("1" * 10_000), "JSON; got "),
    (torch.full((4,), 255, dtype=torch.uint8), "JSON; got "),
    (as_bytes("3"), "format 1; got None, of another version of pyro-snf"),
    (written({}, 0), "format 1; got 0, of another version of pyro-snf"),
    (written({}, 2), "format 1; got 2, of another version of pyro-snf"),
    (written({}, "1"), "format 1; got '1', of another version of pyro-snf"),
    (written([3]), "'values', a dictionary; got [3]"),
    *[
        (written({"count": value}), f"count, an integer >= 0; got {value!r}")
        for value in ("3", -1, 1.0, True, None, [1], {}, math.nan)
    ],
]


PROBES = "log_det.estimator.probes"


@pytest.mark.parametrize(("state", "message"), BROKEN)
def test_broken_state_is_an_error_with_the_key_and_the_class(state: object, message: str) -> None:
    layer = linear(3)
    layer.get_submodule(PROBES).count = 5
    states = {**layer.state_dict(), f"{PROBES}._extra_state": state}
    message = re.escape(f"{PROBES}._extra_state of ProbeStream: expected {message}")
    with pytest.raises(RuntimeError, match=message.replace(r"\.\*", ".*")):
        layer.load_state_dict(states)
    assert layer.get_submodule(PROBES).count == 5


def test_broken_states_are_listed_with_what_else_does_not_fit() -> None:
    layer = linear(3)
    states = layer.state_dict()
    del states["bias"]
    states["theta"] = torch.zeros(4, 4)
    states[f"{PROBES}._extra_state"] = written({"count": -1})
    with pytest.raises(RuntimeError) as caught:
        layer.load_state_dict(states)
    for part in ('Missing key(s) in state_dict: "bias"', "size mismatch for theta", PROBES):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("nested", "message"),
    [
        (3, "nested, a dictionary; got 3"),
        ({}, "nested to have the keys ['count', 'errors']; got []"),
        ({"count": 1}, "nested to have the keys ['count', 'errors']; got ['count']"),
        ({"count": -1, "errors": 0}, "nested.count, an integer >= 0; got -1"),
    ],
)
def test_nested_values_are_checked_and_named(nested: object, message: str) -> None:
    module = Saved()
    values = {"count": 4, "error": 1.5, "name": None, "nested": nested}
    with pytest.raises(RuntimeError, match=re.escape(f"expected {message}")):
        module.set_extra_state(written(values))
    assert module.count == 0  # nothing was loaded


@pytest.mark.parametrize("error", ["nan", None, True, [0.5], {}])
def test_what_is_no_number_is_refused(error: object) -> None:
    values = {"count": 4, "error": error, "name": None, "nested": {"count": 0, "errors": None}}
    message = re.escape(f"expected error, a number; got {error!r}")
    with pytest.raises(RuntimeError, match=message):
        Saved().set_extra_state(written(values))


#: Cases with all the modules of the library that save values.
SAVING = ["linear refined", "linear learned", "conv refined", "free form refined"]


@pytest.mark.parametrize("name", SAVING)
def test_every_value_of_every_layer_is_checked(name: str) -> None:
    layer = CASES[name].make()
    for name, module in layer.named_modules():
        if not isinstance(module, SavesAttributes):
            continue
        values = json.loads(bytes(module.get_extra_state().tolist()))["values"]
        for field, value in paths(values):
            for bad in ("x", -0.5, {}, [], True):
                if isinstance(bad, type(value)) or (value is None and bad == []):
                    continue
                broken = copy.deepcopy(values)
                target = broken
                for key in field[:-1]:
                    target = target[key]
                target[field[-1]] = bad
                states = {**layer.state_dict(), f"{name}._extra_state": written(broken)}
                message = f"{name}._extra_state of {type(module).__name__}: expected .*{field[-1]}"
                with pytest.raises(RuntimeError, match=message):
                    layer.load_state_dict(states)


def paths(values: dict[str, Any]) -> list[tuple[str, ...]]:
    """The values in a nested dictionary, each with its keys."""
    found = []
    for key, value in values.items():
        inner = paths(value) if isinstance(value, dict) else [((), value)]
        found += [((key, *rest), each) for rest, each in inner]
    return found


# --- strict=False -------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [linear, conv, free_form], ids=lambda make: make.__name__)
@pytest.mark.parametrize("source", LOG_DETS)
@pytest.mark.parametrize("target", LOG_DETS)
def test_state_of_another_method_is_loaded_as_far_as_it_goes(
    make: Callable[..., nn.Module], source: str, target: str
) -> None:
    trained, layer = make(3, log_det=source), make(3, log_det=target, seed=1)
    layer.load_state_dict(trained.state_dict(), strict=False)
    assert torch.equal(next(layer.parameters()), next(trained.parameters()))
    if source != target and "exact" in (source, target):
        with pytest.raises(RuntimeError, match=r"key\(s\) in state_dict: .*log_det"):
            layer.load_state_dict(trained.state_dict())


def test_values_that_are_missing_keep_what_they_were_and_bad_ones_are_errors() -> None:
    module, state = Saved(), {"_extra_state": written({"count": 4, "more": 1})}
    module.name = "mine"
    module.load_state_dict(state, strict=False)
    assert (module.count, module.name) == (4, "mine")
    with pytest.raises(RuntimeError) as caught:
        module.load_state_dict(state)
    assert 'Missing key(s) in state_dict: "_extra_state.error", "_extra_state.name", ' in str(
        caught.value
    )
    assert 'Unexpected key(s) in state_dict: "_extra_state.more"' in str(caught.value)
    with pytest.raises(RuntimeError, match=r"expected .* 'nested'.; got .'count', 'more'."):
        module.set_extra_state(state["_extra_state"])
    with pytest.raises(RuntimeError, match="_extra_state of Saved: expected count, an integer"):
        module.load_state_dict({"_extra_state": written({"count": "4"})}, strict=False)
    module.load_state_dict({}, strict=False)
    assert module.count == 4


# --- The format ---------------------------------------------------------------------------------


def test_length_does_not_depend_on_the_values() -> None:
    # Of this library's own modules, with the longest numbers: a checkpoint that is loaded in place
    # needs tensors of equal lengths.
    for name in SAVING:
        for module in CASES[name].make().modules():
            if isinstance(module, SavesAttributes):
                values = json.loads(bytes(module.get_extra_state().tolist()))["values"]
                for (*keys, last), value in paths(values):
                    target = values
                    for key in keys:
                        target = target[key]
                    number = 10**12 if isinstance(value, int) else 1.2345678901234567e-300
                    target[last] = [10**6] * 3 if value is None else number
                assert len(written(values)) <= 512 == len(module.get_extra_state())
