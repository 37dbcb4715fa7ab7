"""Make and judge one point of the training study."""

from dataclasses import asdict, replace
from pathlib import Path

import torch

from mod_export.calibration.thresholds import set_thresholds
from mod_export.config import UnitConfig
from mod_export.convert import convert
from mod_export.data import text as data_text
from mod_export.evaluation.perplexity import loss
from mod_export.evaluation.readers import Pair, TorchReader
from mod_export.model import loading
from mod_export.model.mod_model import MoDModel
from mod_export.training.config import TrainConfig
from mod_export.training.run import train
from mod_export.units import UNIT_KINDS, shares_by_kind

SINKS = 4


def activation_for(
    kv_share: float,
    window: int,
    length: int,
    n_layer: int,
    whole: int = UNIT_KINDS["kv"].first_layer,
) -> float:
    """Activation of kv units at which a sequence of `length` tokens holds `kv_share` of the dense
    K/V at its end.

    whole: layers without a router.
    """
    of_units = (kv_share * n_layer - whole) / (n_layer - whole)
    recent = (window - 1) / length
    return min(1.0, max(0.005, (of_units - recent) / (1 - recent)))


def make_point(
    name: str,
    point: dict,
    out: Path,
    model: str,
    data: tuple,
    tokens: int,
    length: int,
    precision: str,
    batch: int,
    train_length: int,
    **_,
):
    """-> the MoDModel of a point, and what is known of how it was made."""
    if "kv_share" in point:
        n_layer = 30 if model == "smollm2" else loading.load(model)[0].config.num_hidden_layers
        target = activation_for(point["kv_share"], point["window"], length, n_layer)
    else:
        target = point["target"]
    shares = shares_by_kind(target, point["units"].split("+")).values()
    start = out / "-".join(
        [point["units"], *(f"{share:.4f}" for share in shares)]
    )  # a window has a target of its own
    if not start.exists():
        convert(
            model,
            start,
            units=point["units"],
            target=target,
            kv_window=point.get("window"),
            sink_tokens=SINKS,
        )
    if point["way"] == "window":
        return as_window(MoDModel.load(start), target, length), {"target": target}
    if point["train"] is None:
        return MoDModel.load(start), {"target": target}
    made = out / name
    config = TrainConfig(
        data=tuple(data_text),
        target=target,
        tokens=tokens,
        length=train_length,
        batch=batch,
        precision=precision,
        limit=4 * tokens,
        **point["train"],
    )
    resume = Path(f"{made}.run/checkpoint.pt").exists()
    figures = train(str(start), str(made), config, resume=resume, force=True)
    return MoDModel.load(made), {"target": target, "held_out": figures}


def as_window(model: MoDModel, target: float, length: int) -> MoDModel:
    """Sinks and a recent window that hold as many K/V at the end of `length` tokens as routers of
    this activation.
    """
    never = tuple(0.999 if p else 0.0 for p in model.config.units["kv"].threshold)
    least = model.config.kv_window
    window = round(target * (length - least)) + least - SINKS
    config = replace(model.config, kv_window=window, units={"kv": UnitConfig(never, never)})
    routers = {
        unit: (torch.zeros_like(w), torch.full_like(b, -20))
        for unit, (w, b) in model.router_tensors().items()
    }
    return MoDModel.from_base(model.base, model.tokenizer, config, routers)


def meet(made: MoDModel, sequences: torch.Tensor, target: float | dict) -> None:
    """Shift the thresholds of each kind for the target on these sequences: ways are compared at
    equal activation.
    """
    groups = made.config.by_kind()
    set_thresholds(made, sequences, groups, shares_by_kind(target, groups), rounds=2)


@torch.inference_mode()
def judge_point(
    made: MoDModel,
    target: float | dict | None,
    model: str,
    texts: tuple,
    length: int,
    count: int,
    **_,
) -> dict:
    """KL and perplexities against the original `model`, on each text; with activation and K/V.

    target: thresholds are moved, all alike, until these texts have this activation; None: they are
    left as they are.
    """
    original, found = loading.load(model)[0], {}
    for module in (original, made):
        module.to("cuda" if torch.cuda.is_available() else "cpu")
    files = dict(text.split("=", 1) for text in texts)
    if target is not None:
        firsts = [
            data_text.pack(made.tokenizer, data_text.read_texts([file]), length, 1)
            for file in files.values()
        ]
        meet(made, torch.cat(firsts), target)
    dense = TorchReader(MoDModel.from_base(original, made.tokenizer), model)
    pair = Pair(dense, TorchReader(made))
    for name, file in files.items():
        found[name] = asdict(
            loss(pair, data_text.pack(made.tokenizer, data_text.read_texts([file]), length, count))
        )
    return found
