"""Train on a GPU for some minutes and judge what came of it before the time is up; see train.sh.

Speeds come first: routers alone and LoRA beside plain fine-tuning of the same model. They say how
many tokens each training can have, so that it ends, with its schedule, in its share of the time.
Then the start and each trained adapter are judged on the texts of data/dev. train.json has all
figures and is written after each step; a step that fails is named there.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from mod_export.cli.output import show_messages
from mod_export.common.files import atomic_file
from mod_export.common.tables import format_table
from mod_export.data.text import default_texts
from mod_export.formats import adapter_files

PARAMETERS = os.environ.get("TRAIN", "routers,lora").split(",")
SPEED_SHARE, JUDGE_SHARE = 0.2, 0.25  # of the time
USED_SHARE = 0.75  # of a training's time; the rest is the start and the writing
MOD = (sys.executable, "-m", "mod_export")


class Run:
    """The folders of a run, its figures so far, and its end."""

    def __init__(self, work: Path, out: Path, seconds: float):
        self.work, self.out = work, out
        self.seconds, self.end = seconds, time.monotonic() + seconds
        start = work / "start"
        self.start = str(start) if start.exists() else "smollm2-kv"
        self.length = os.environ.get("LENGTH", "2048")
        self.batch = os.environ.get("BATCH", "8")
        self.step_tokens = int(self.length) * int(self.batch)
        self.figures: dict = {"start": self.start, "speed": {}, "trained": {}, "judged": {}}

    def left(self) -> float:
        return self.end - time.monotonic()

    def step(self, name: str, command: list[str], seconds: float) -> bool:
        """Run a command for so long at most, with its output in a log; whether it went well."""
        with (self.out / f"{name}.log").open("w") as log:
            try:
                limit = max(1.0, min(seconds, self.left()))
                process = subprocess.run(command, stdout=log, stderr=log, timeout=limit)
                state = "done" if process.returncode == 0 else f"code {process.returncode}"
            except subprocess.TimeoutExpired:
                state = "time was up"
        print(f"{name}: {state}, {self.left():.0f} s are left", flush=True)
        if state != "done":
            self.figures.setdefault("failures", {})[name] = state
            self.save()
        return state == "done"

    def save(self) -> None:
        with atomic_file(self.out / "train.json", force=True) as tmp:
            tmp.write_text(json.dumps(self.figures, indent=1) + "\n")


def main() -> int:
    work, out, minutes = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
    show_messages(stdout=True)
    run = Run(work, out, 60 * minutes)
    for parameters in PARAMETERS:
        measure_speed(run, parameters)
    judging = JUDGE_SHARE * run.seconds
    for number, parameters in enumerate(PARAMETERS):
        if parameters in run.figures["speed"]:
            train(run, parameters, (run.left() - judging) / (len(PARAMETERS) - number))
    names = [run.start, *(str(out / f"trained-{name}") for name in run.figures["trained"])]
    for number, name in enumerate(names):
        judge(run, name, run.left() / (len(names) - number))
    print(table(run.figures))
    return 1 if "failures" in run.figures else 0


def measure_speed(run: Run, parameters: str) -> None:
    target = run.out / f"speed-{parameters}.json"
    text, own = run.out / "speed.txt", "\n\n\n".join(default_texts())
    text.write_text("\n\n\n".join([own] * (1 + 8 * run.step_tokens // len(own))))
    command = [sys.executable, "-m", "scripts.studies.train_speed", run.start, "--text", str(text)]
    command += ["--train", parameters, "--length", run.length, "--batch", run.batch]
    command += ["--precision", precision(), "--rounds", "3", "--json", str(target)]
    if run.step(f"speed-{parameters}", command, SPEED_SHARE / len(PARAMETERS) * run.seconds):
        run.figures["speed"][parameters] = json.loads(target.read_text())
        run.save()


def train(run: Run, parameters: str, seconds: float) -> None:
    """Train for as many tokens as the measured speed allows."""
    rate = run.figures["speed"][parameters]["tokens/s"]
    step = run.step_tokens
    wanted = min(USED_SHARE * seconds * rate, float(os.environ.get("TOKENS", "inf")))
    tokens = max(1, int(wanted) // step) * step
    config = adapter_files.read(adapter_files.resolve(run.start)).config
    share = config.calibration["training"]["target"]
    data = [path for path in sorted((run.work / "data").iterdir()) if path.name != "dev"]
    command = [*MOD, "train", run.start, "-o", str(run.out / f"trained-{parameters}"), "--force"]
    command += [word for path in data for word in ("-d", str(path))]
    command += ["--train", parameters, "--target-activation", str(share), "--tokens", str(tokens)]
    command += ["--length", run.length, "--batch", run.batch, "--precision", precision()]
    if run.step(f"train-{parameters}", command, seconds):
        run.figures["trained"][parameters] = {"tokens": tokens, "target": share}
        run.save()


def judge(run: Run, name: str, seconds: float) -> None:
    """The figures of an adapter on the texts of dev."""
    short, texts = Path(name).name, sorted((run.work / "data/dev").glob("*.txt"))
    target = run.out / f"eval-{short}.json"
    command = [*MOD, "eval", name, *(word for path in texts for word in ("--text", str(path)))]
    command += ["--device", device(), "--count", os.environ.get("COUNT", "4")]
    if run.step(f"eval-{short}", [*command, "--json", str(target), "--force"], seconds):
        run.figures["judged"][short] = json.loads(target.read_text())["texts"]
        run.save()


def device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def precision() -> str:
    return "bf16" if device() == "cuda" else "no"


def table(figures: dict) -> str:
    speeds = [list(row.values()) for row in figures["speed"].values()]
    head = list(next(iter(figures["speed"].values()), {}))
    judged = [
        [name, Path(text["text"]).name, text["kl"], text["perplexity"] / text["perplexity_dense"]]
        for name, texts in figures["judged"].items()
        for text in texts
    ]
    said = format_table(["adapter", "text", "KL", "perplexity / dense"], judged)
    return f"{format_table(head, speeds)}\n\n{said}" if speeds else said


if __name__ == "__main__":
    sys.exit(main())
