"""Measure the runtime on a GPU machine without a network and with little time: one call, 9 minutes.

    scripts/gpu/call OUT                            # there; gpu/prebuilt lies in the checkout
    scripts/gpu/call OUT --parts ops,sanitize       # other checks

The call unpacks what scripts/gpu/prebuild has made, checks the versions of driver and toolkit, and
runs the parts in the order of their worth. Each part is a process with a time of its own, writes
OUT/PART.json at once, and disturbs no other part where it fails. OUT/call.log has what the parts
said, OUT/call.json how each went and the figures that must reach a bound. The output ends with
tables.

The exit code is 0 where all parts passed, 1 where a check failed, 2 where something is missing, 3
where time was up or the call was stopped. `--rehearse` runs a CPU build with the smallest sizes.
"""

import argparse
import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
PREBUILT = ROOT / "gpu/prebuilt"
# seconds of each part; `profile` takes what is left
PARTS = {"parity": 30, "decode": 180, "prefill": 120, "sequences": 60, "long": 60, "profile": 60}
MORE_PARTS = {"ops": 60, "sanitize": 240}
MEASURED = ("decode", "prefill", "sequences", "long")  # plans of plans.py
SCRIPTS = dict.fromkeys(MEASURED, "measure") | {"profile": "stages"}
LEAST_DRIVERS = {12: 525, 13: 580}  # the first driver of each CUDA
LEAST_SECONDS = 5
GRACE_SECONDS = 10  # a part ends by itself; after so long it is ended
TABLE_SECONDS = 10
WORDS = {0: "passed", 1: "a check failed", 2: "could not run"}


class CallError(Exception):
    """What is wrong, and what to do."""


def main() -> int:
    args = parse()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    args.out.mkdir(parents=True, exist_ok=True)
    for name in ("call.log", "call.json", *(f"{part}.json" for part in args.parts)):
        (args.out / name).unlink(missing_ok=True)
    work = Path(tempfile.mkdtemp(prefix="gpu-call-", dir=args.work))
    try:
        about = unpack(args.prebuilt, work)
        if not args.rehearse:
            check_versions(about)
        env = environment(work, args.out.resolve(), args.rehearse, about)
        check = [sys.executable, HERE / "prebuild.py", "--check", "--output", args.prebuilt]
        subprocess.run(check, env=env)  # says whether the package is that of the checkout
        return conclude(args.out, run_all(args, env, work, about["key"]), env)
    except CallError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 2
    finally:
        shutil.rmtree(work, ignore_errors=True)


def run_all(args: argparse.Namespace, env: dict, work: Path, key: str) -> dict[str, dict]:
    """Run the parts; how each went. The models of the plans are written meanwhile."""
    started, states = time.monotonic(), {}
    needed = set(args.parts) & set(SCRIPTS)
    writer = start("plans", env, work / "models.log") if needed else None
    try:
        for name in args.parts:
            left = args.seconds - TABLE_SECONDS - (time.monotonic() - started)
            seconds = left if name == args.parts[-1] else min((PARTS | MORE_PARTS)[name], left)
            begun = time.monotonic()
            print(f"{name}, {seconds:.0f} s", flush=True)
            state = missing_models(writer, seconds, work) if name in SCRIPTS else None
            state = state or run(name, seconds - (time.monotonic() - begun), env, args.out)
            took = round(time.monotonic() - begun, 1)
            print(f"  {state} ({took} s)", flush=True)
            states[name] = {"state": state, "seconds": took}
            save(args.out, states, key)
    except KeyboardInterrupt:
        states["call"] = {"state": "stopped", "seconds": round(time.monotonic() - started, 1)}
        save(args.out, states, key)
    finally:
        if writer:
            end(writer)
    return states


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="the folder of the results")
    parser.add_argument("--prebuilt", type=Path, default=PREBUILT, help="of scripts/gpu/prebuild")
    parser.add_argument("--parts", default=",".join(PARTS), help="some of the parts, with commas")
    parser.add_argument("--seconds", type=float, default=540.0, help="for all of it")
    parser.add_argument("--work", type=Path, help="where models are written; 25 GB, best in memory")
    parser.add_argument("--rehearse", action="store_true", help="a CPU build, the smallest sizes")
    args = parser.parse_args()
    args.parts = args.parts.split(",")
    if unknown := sorted(set(args.parts) - set(PARTS | MORE_PARTS)):
        parser.error(f"unknown part {unknown[0]}; parts are {', '.join(PARTS | MORE_PARTS)}")
    memory = Path("/dev/shm")
    if args.work is None and memory.is_dir() and shutil.disk_usage(memory).free > 30e9:
        args.work = memory
    return args


def unpack(prebuilt: Path, work: Path) -> dict:
    """Unpack the archive into `work`; what its JSON file says."""
    try:
        about = json.loads((prebuilt / "prebuilt.json").read_text())
        data = (prebuilt / "prebuilt.tar.gz").read_bytes()
    except OSError:
        raise CallError(
            f"there is no package in {prebuilt}; scripts/gpu/prebuild makes it"
        ) from None
    if hashlib.sha256(data).hexdigest() != about["sha256"]:
        raise CallError(f"the package in {prebuilt} is damaged; copy it again")
    subprocess.run(["tar", "-xzf", prebuilt / "prebuilt.tar.gz", "-C", work], check=True)
    shutil.copy(prebuilt / "prebuilt.json", work)
    return about


def check_versions(about: dict) -> None:
    """Raise CallError where the driver, the GPU or the toolkit cannot run the libraries."""
    fields = "name,driver_version,compute_cap"
    try:
        said = subprocess.run(
            ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=30,
        )
        name, driver, capability = (word.strip() for word in said.stdout.splitlines()[0].split(","))
    except (OSError, IndexError, ValueError, subprocess.TimeoutExpired):
        raise CallError("nvidia-smi names no GPU; install the driver") from None
    print(f"{name}, driver {driver}, compute capability {capability}", flush=True)
    if about["cuda"] is None:
        raise CallError("the package is of a CPU build; make another with scripts/gpu/prebuild")
    major, least = about["cuda"][0], LEAST_DRIVERS[about["cuda"][0]]
    if int(driver.split(".")[0]) < least:
        raise CallError(f"driver {driver} is too old for CUDA {major}; it takes {least} or later")
    if capability.replace(".", "") != about["architecture"]:
        raise CallError(
            f"{name} has compute capability {capability}, the libraries are for "
            f"{about['architecture']}; build for this one"
        )


def environment(work: Path, out: Path, rehearse: bool, about: dict) -> dict[str, str]:
    """The environment of the parts: the package's libraries and Python packages come first.

    Raises CallError where cuBLAS is missing.
    """
    paths = [str(HERE), str(ROOT), str(work / "site"), os.environ.get("PYTHONPATH", "")]
    more = {
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
        "LLAMA_CPP_LIB_PATH": str(work / "lib"),
        "MOD_EXPORT_CACHE": str(work / "cache"),
        "GPU_WORK": str(work),
        "GPU_OUT": str(out),
    }
    folders = [str(work / "lib")]
    if rehearse:
        more["MOD_REHEARSE"] = "1"
    else:
        folders += [str(toolkit_library(name, about["cuda"][0])) for name in ("cublas", "cudart")]
    more["LD_LIBRARY_PATH"] = os.pathsep.join([*folders, os.environ.get("LD_LIBRARY_PATH", "")])
    return os.environ | more


def toolkit_library(name: str, major: int) -> Path:
    """The folder of a library of the toolkit or of NVIDIA's Python packages."""
    roots = [os.environ.get("CUDA_PATH", ""), os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    folders = [Path(root, lib) for root in filter(None, roots) for lib in ("lib64", "lib")]
    for path in filter(None, sys.path):
        packages = Path(path, "nvidia")
        folders += [
            packages / f"cu{major}/lib",
            packages / name.replace("cudart", "cuda_runtime") / "lib",
        ]
    for folder in folders:
        if (folder / f"lib{name}.so.{major}").is_file():
            return folder
    raise CallError(f"lib{name}.so.{major} is missing; install CUDA {major}, or set CUDA_PATH")


def missing_models(writer: subprocess.Popen, seconds: float, work: Path) -> str | None:
    """Wait for the models of the plans; why there are none, or None."""
    try:
        if writer.wait(timeout=max(seconds, 0)) == 0:
            return None
    except subprocess.TimeoutExpired:
        return "time was up before the models were written"
    return f"no models: {last_line(work / 'models.log')}"


def run(name: str, seconds: float, env: dict, out: Path) -> str:
    """Run a part for at most so many seconds; how it went."""
    if seconds < LEAST_SECONDS:
        return "no time was left"
    script, arguments = SCRIPTS.get(name, name), [name] * (name in MEASURED)
    log = out / "call.log"
    process = start(script, env | {"GPU_SECONDS": str(seconds)}, log, *arguments)
    try:
        code = process.wait(timeout=seconds + GRACE_SECONDS)
        state = WORDS.get(code, f"ended with code {code}")
    except subprocess.TimeoutExpired:
        state = "time was up"
    finally:
        end(process)
    return state if state == WORDS[0] else f"{state}: {last_line(log)}"


def start(script: str, env: dict, log: Path, *args: str) -> subprocess.Popen:
    """Start a script of this folder in a session of its own, with its output in the log."""
    with log.open("a") as file:
        print("==", script, *args, file=file, flush=True)
        return subprocess.Popen(
            [sys.executable, HERE / f"{script}.py", *args],
            env=env,
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def end(process: subprocess.Popen) -> None:
    """End a part; first so that it can end its own processes."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=5)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return re.sub(r"^error: ", "", lines[-1]) if lines else "no output"


def save(out: Path, states: dict, key: str) -> None:
    part = out / "call.json.part"
    part.write_text(json.dumps({"package": key, "parts": states}, indent=1) + "\n")
    part.replace(out / "call.json")


def conclude(out: Path, states: dict, env: dict) -> int:
    """Print the tables and how each part went; the exit code."""
    subprocess.run([sys.executable, HERE / "report.py", out], env=env)
    for name, state in states.items():
        print(f"{name}: {state['state']} ({state['seconds']:.0f} s)")
    words = [state["state"] for state in states.values()]
    if any(word.startswith(("time", "no time", "stopped")) for word in words):
        return 3
    return 0 if all(word == WORDS[0] for word in words) else 1


if __name__ == "__main__":
    sys.exit(main())
