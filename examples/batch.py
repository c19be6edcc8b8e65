"""A job over a directory: each ``.npz`` of inputs becomes one of outputs. Started again, it does what is left.

optpass optimize fashion-vit --preset balanced --dynamic pixel_values:0=1..256 -o engine
python examples/batch.py engine inputs/ outputs/
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import numpy as np

import optpass


def main() -> int:
    """Exit code 0 where every file was done, 1 where some could not be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", type=Path)
    parser.add_argument("inputs", type=Path)
    parser.add_argument("outputs", type=Path)
    options = parser.parse_args()
    session = optpass.load(options.engine)
    options.outputs.mkdir(parents=True, exist_ok=True)
    files = sorted(options.inputs.glob("*.npz"))
    left = [file for file in files if not (options.outputs / file.name).exists()]
    failed, rows, begin = 0, 0, time.perf_counter()
    for file in left:
        try:
            with np.load(file, allow_pickle=False) as arrays:
                inputs = {info.name: arrays[info.name] for info in session.inputs}
            outputs = session.run(**inputs)
        except (optpass.OptpassError, OSError, ValueError, KeyError) as error:
            failed += 1
            print(f"{file.name}: {error}", file=sys.stderr)
            continue
        unfinished = options.outputs / f".{file.name}"
        with unfinished.open("wb") as target:
            np.savez(target, **outputs)  # type: ignore[arg-type]
        os.replace(unfinished, options.outputs / file.name)  # a job that is killed leaves no half file behind
        rows += len(next(iter(outputs.values())))
    seconds = time.perf_counter() - begin
    done = f"{len(left) - failed} files done, {len(files) - len(left)} were done before, {failed} failed"
    print(f"{done}; {rows} rows in {seconds:.2f} s on {session.name}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
