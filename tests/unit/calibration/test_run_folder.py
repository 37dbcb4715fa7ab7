"""A calibration that is stopped goes on, with what it would have found in one go."""

import random

import pytest
import torch

from mod_export.calibration.calibrate import calibrate
from mod_export.calibration.measuring import CalibrationPlan
from mod_export.calibration.run_folder import run_folder
from mod_export.errors import UserError
from mod_export.model.layer_walk import LayerWalk
from tests.support import tiny_torch as tiny
from tests.support.byte_tokenizer import TEXT, byte_tokenizer

PLAN = CalibrationPlan({"kv": [1, 2, 4], "block": [3]}, 0.4, 16, text=TEXT, rounds=3)


class Stop(KeyboardInterrupt):
    pass


def stopped_after(steps: int, monkeypatch) -> list[int]:
    """Let walks stop after so many steps, each a sequence through a layer; return a counter."""
    keep, count = LayerWalk.keep, [0]

    def counted(self, number, out):
        count[0] += 1
        if count[0] > steps:
            raise Stop
        keep(self, number, out)

    monkeypatch.setattr(LayerWalk, "keep", counted)
    return count


def test_a_stopped_calibration_goes_on(tmp_path, monkeypatch):
    """Stopped five times, anywhere in its passes; no layer that is done is computed again."""
    count = stopped_after(10**9, monkeypatch)
    config, routers = calibrate(tiny.base(), byte_tokenizer(), PLAN)
    total, done, stops = count[0], 0, 0
    monkeypatch.undo()
    draw = random.Random(5)
    while True:
        steps = draw.randrange(total // 4, total // 2) if stops < 5 else 10**9
        count = stopped_after(steps, monkeypatch)
        try:
            with run_folder(tmp_path / "run", {"n": 1}) as folder:
                found = calibrate(tiny.base(), byte_tokenizer(), PLAN, folder)
            break
        except Stop:
            stops += 1
        finally:
            done += count[0]
            monkeypatch.undo()
    assert stops >= 2 and done < 1.6 * total
    assert found[0] == config and found[1].keys() == routers.keys()
    pairs = [pair for unit in routers for pair in zip(routers[unit], found[1][unit], strict=True)]
    assert all(torch.equal(*pair) for pair in pairs)
    # It is all there: nothing is computed any more.
    count = stopped_after(0, monkeypatch)
    with run_folder(tmp_path / "run", {"n": 1}) as folder:
        assert calibrate(tiny.base(), byte_tokenizer(), PLAN, folder)[0] == config


def test_folders_that_do_not_fit(tmp_path):
    with run_folder(tmp_path / "run", {"a": 1, "b": (2,)}) as folder:
        (folder / "measured.pt").write_bytes(b"torn")
        with pytest.raises(UserError, match="another process converts into .*run; wait for it"):
            run_folder(tmp_path / "run", {"a": 1, "b": [2]}).__enter__()
        with pytest.raises(UserError, match=r"measured.pt is damaged .*; remove .*measured.pt"):
            calibrate(tiny.base(), byte_tokenizer(), PLAN, folder)
    with pytest.raises(UserError, match="of a conversion with another b; give the same arguments"):
        run_folder(tmp_path / "run", {"a": 1, "b": [3]}).__enter__()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/letter.txt").write_text("dear")
    with pytest.raises(UserError, match="mine is no folder of a conversion"):
        run_folder(tmp_path / "mine", {}).__enter__()
    with pytest.raises(UserError, match="nothing was kept"), run_folder(tmp_path / "new", {}):
        raise UserError("nothing was kept", "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "run"]
