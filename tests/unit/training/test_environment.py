"""Variables of the environment that ask a training run for what it does not do."""

import os

import pytest

from mod_export.errors import UserError
from mod_export.training import environment
from mod_export.training.run import train
from tests.support import training_runs


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "BACKEND=INDUCTOR: .* TorchDynamo; unset it"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "USE_DEEPSPEED=true: .* DeepSpeed; launch with"),
        ({"ACCELERATE_USE_MEGATRON_LM": "1"}, "Megatron"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "True"}, "tensor or context parallelism"),
        ({"ACCELERATE_TORCH_DEVICE": "cuda:1"}, "choose with --device"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "use --accumulate 4"),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "the run has bf16; .* --precision"),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_ACTIVATION_CHECKPOINTING": "true"},
            "use --recompute",
        ),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_OFFLOAD_PARAMS": "true"}, "OFFLOAD_PARAMS=true"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 without RANK: .*; unset WORLD_SIZE, or"),
        ({"PMI_SIZE": "2"}, "PMI_SIZE=2 without PMI_RANK"),
        ({"LOCAL_RANK": "0"}, "LOCAL_RANK=0 without RANK"),
    ],
)
def test_what_a_run_does_not_do_is_refused_by_name(variables, message):
    with pytest.raises(UserError, match=message):
        environment.check(variables, "bf16")


def test_what_accelerate_launch_sets_is_taken():
    """The variables of `accelerate launch --use_fsdp --fsdp_version 2`, and of torchrun."""
    variables = {
        "ACCELERATE_USE_CPU": "False",
        "ACCELERATE_MIXED_PRECISION": "no",
        "ACCELERATE_DYNAMO_BACKEND": "NO",
        "ACCELERATE_DYNAMO_MODE": "default",
        "ACCELERATE_DYNAMO_USE_FULLGRAPH": "False",
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_OFFLOAD_PARAMS": "false",
        "FSDP_ACTIVATION_CHECKPOINTING": "false",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
        "RANK": "1",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "2",
    }
    environment.check(variables, "bf16")
    # transformers would give the second process empty weights
    assert variables["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"


def test_train_asks_before_it_loads_the_model(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    before = dict(os.environ)
    with pytest.raises(UserError, match="ACCELERATE_DYNAMO_BACKEND=INDUCTOR"):
        train(tmp_path / "none", tmp_path / "out", training_runs.config(tmp_path))
    assert os.environ == before
