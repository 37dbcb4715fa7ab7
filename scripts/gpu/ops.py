"""Compare our operations on the GPU with the CPU by test-backend-ops; the result is ops.json."""

import re
import subprocess
import time
from collections import Counter

from common import LIB, OPS, REHEARSE, part, save

BACKEND = "CPU" if REHEARSE else "CUDA0"


def main() -> bool:
    start = time.monotonic()
    done = subprocess.run(
        command(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    lines = [re.sub(r"\x1b\[[\d;]*m", "", line).strip() for line in done.stdout.splitlines()]
    counts, bad = Counter(), []
    for line in lines:
        if found := re.match(r"(MOD_\w+)\(.*\): ", line):
            counts[found[1]] += 1
            if not line.endswith(": OK"):
                bad.append(line)
    missing = sorted(set(OPS.split(",")) - set(counts))
    passed = done.returncode == 0 and not bad and not missing
    save(
        "ops.json",
        {
            "backend": BACKEND,
            "cases": counts,
            "failed": bad,
            "missing": missing,
            "passed": passed,
            "exit": done.returncode,
            "seconds": round(time.monotonic() - start, 1),
        },
    )
    if not passed:
        print("\n".join([*(bad or lines[-10:]), *(f"no case of {op}" for op in missing)]))
    print(
        f"{sum(counts.values())} cases on {BACKEND}: "
        + ("all passed" if passed else f"exit {done.returncode}")
    )
    return passed


def command() -> list[str]:
    return [str(LIB / "test-backend-ops"), "test", "-o", OPS, "-b", BACKEND]


if __name__ == "__main__":
    part(main)
