"""The toy trainer itself, without torch so that it starts at once: counts steps, saves each, logs each."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import NoReturn

from polycom_ext.files import write_text
from polycom_ext.runs import entry, record


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        entry.note_refusal(message)
        super().error(message)


def main() -> None:
    parser = Parser()
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--size", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=0.0, help="a step")
    parser.add_argument("--save-interval", type=int, default=1)
    parser.add_argument("--save-seconds", type=float, help="of a checkpoint that it saves when told to stop")
    parser.add_argument("--fail-at", type=int)
    parser.add_argument("--refuse", help="the sentence")
    parser.add_argument("--mute", action="store_true", help="whatever it has to say")
    parser.add_argument("--talk", help="what it says of itself")
    parser.add_argument("--give-up", help="says so and ends with status 0, as Megatron does at times")
    parser.add_argument("--helper", type=float, help="seconds that a forked process waits, as writers do")
    parser.add_argument("--fill", type=int, default=0, help="megabytes of each checkpoint")
    args = parser.parse_args()
    if args.mute:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    if args.refuse:
        entry.refuse(args.refuse)
        sys.exit(2)
    if args.give_up:
        print(args.give_up, flush=True)
        return
    if args.talk:
        print(f"the key is {len(os.environ.get('TOY_API_KEY', ''))} long", flush=True)
        print(f"says {args.talk}", flush=True)
    assert Path.home().is_dir(), "somewhere for caches"
    assert os.environ["TOY"] == "1", "the adapter's environment"
    assert os.environ["TOY_SPEC"] == "a b", "the spec's environment"
    rank = int(os.environ["RANK"])
    stopped = entry.hear_stop() if args.save_seconds is not None else lambda: False
    if args.helper and (helper := os.fork()) == 0:
        time.sleep(args.helper)
        os._exit(0)
    elif args.helper:
        (args.run_dir / f"helper-{rank}").write_text(str(helper))
    (args.run_dir / f"pid-{rank}").write_text(str(os.getpid()))
    checkpoint = args.run_dir / "checkpoints" / "step"
    checkpoint.parent.mkdir(exist_ok=True)
    first = int(checkpoint.read_text()) + 1 if checkpoint.exists() else 1
    for step in range(first, args.steps + 1):
        if step == args.fail_at:
            raise RuntimeError(f"no step {step} in this world")
        time.sleep(args.seconds)
        print(f"upstream's own chatter about step {step}", flush=True)
        if rank == 0:
            values = {record.TRAIN_LOSS: 5.0 / step, record.STEP_SECONDS: 0.5}
            record.append(record.Record(args.run_dir).metrics, step, values)
        stops = stopped()
        if stops:
            print("saving before the end", flush=True)
            time.sleep(args.save_seconds)
        if rank == 0 and (stops or step % args.save_interval == 0):
            if args.fill:
                checkpoint.with_name("weights").write_bytes(bytes(args.fill << 20))
            write_text(checkpoint, str(step))  # whole, whoever reads it meanwhile
        if stops:
            return


if __name__ == "__main__":
    with entry.watching_the_disk():
        main()
