"""Captions of the default template as fast as version 0.2.0's own code makes them, in one run. Prints one table.

``python benchmarks/caption_versions.py OLD [--captions 2000] [--rounds 9] [--tokenizers FOLDER]``

OLD is a checkout of version 0.2.0, such as ``git worktree add OLD f02ee99`` makes. A process of each version has the
same posts, and both do the same work by turns, in seconds of CPU; each round is another pass. The script fails where a
pass's captions differ. The table has medians, and the median of each round's ratio to the old version's line.
"""

import argparse
import hashlib
import importlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

BATCH, MAX_TOKENS = 16, 225
WORK = {"draw": "composed and drawn", "all": "composed, drawn, tokenized, cut into chunks"}


def load_version() -> tuple[Callable[[dict[str, Any], int], str], Callable[[Path], Any], Callable[..., Any]]:
    """How the version that this process runs draws a caption, loads tokenizers, and cuts captions into chunks."""
    find = importlib.import_module
    try:
        template = find("trainer.data.template")
    except ImportError:  # version 0.2.0
        draws, tokens = find("trainer.data.draws"), find("trainer.models.text")
        rules = find("trainer.schema").CaptionsConfig()
    else:
        draws, tokens = find("trainer.data.caption_draws"), find("trainer.data.tokens")
        rules = template.ready_rules(find("trainer.config.schema").CaptionsConfig())

    def load(base: Path) -> Any:
        folders = base / "tokenizer", base / "tokenizer_2"
        sizes = [len(tokens.read_bpe(folder)[0]) for folder in folders]
        return tokens.load_tokenizers(*folders, (sizes[0], sizes[1]))

    return (lambda row, pass_: draws.draw_sample_caption(row, pass_, 42, rules)), load, tokens.tokenize_captions


def serve(rows_file: Path, base: Path) -> None:
    """Do what each line of stdin asks for, "draw 3" or "all 3"; answer with seconds of CPU and the captions' hash."""
    rows = json.loads(rows_file.read_text(encoding="utf-8"))
    draw, load, tokenize = load_version()
    tokenizers = load(base)
    for line in sys.stdin:
        work, pass_ = line.split()
        captions: list[str] = []
        start = time.process_time()
        for first in range(0, len(rows), BATCH):
            some = [draw(row, int(pass_)) for row in rows[first : first + BATCH]]
            if work == "all":
                tokenize(some, tokenizers, MAX_TOKENS)
            captions += some
        seconds = time.process_time() - start
        print(seconds, hashlib.sha256("\n".join(captions).encode()).hexdigest(), flush=True)


def ask(process: "subprocess.Popen[str]", work: str, pass_: int) -> tuple[float, str]:
    """What a version's process takes for a work, and the hash of its captions."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(f"{work} {pass_}\n")
    process.stdin.flush()
    seconds, digest = process.stdout.readline().split()
    return float(seconds), digest


def main() -> None:
    parser = argparse.ArgumentParser(description="The default template beside version 0.2.0's own code.")
    parser.add_argument("old", type=Path, help="a checkout of version 0.2.0")
    parser.add_argument("--captions", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokenizers", type=Path, help="a base model's folder with tokenizer and tokenizer_2")
    arguments = parser.parse_args()
    from posts import find_tokenizer_base, make_rows, print_rates

    with tempfile.TemporaryDirectory() as name:
        base, rows_file = find_tokenizer_base(arguments.tokenizers, Path(name)), Path(name) / "rows.json"
        rows_file.write_text(json.dumps(list(make_rows(arguments.captions))), encoding="utf-8")
        here = Path(__file__).resolve()
        versions = {
            version: subprocess.Popen(
                [sys.executable, str(here), "--serve", str(rows_file), str(base)],
                env={"PATH": "", "PYTHONPATH": str(folder)}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )
            for version, folder in (("0.2.0", arguments.old.resolve()), ("ours", here.parents[1]))
        }  # fmt: skip
        rates: dict[str, dict[str, list[float]]] = {work: {} for work in WORK}
        for pass_ in range(arguments.rounds + 1):
            for work, words in WORK.items():
                digests = set()
                for version in list(versions)[:: 1 if pass_ % 2 else -1]:
                    seconds, digest = ask(versions[version], work, pass_)
                    digests.add(digest)
                    if pass_:  # the first pass fills the caches
                        rates[work].setdefault(f"{version}: {words}", []).append(arguments.captions / seconds)
                if len(digests) > 1:
                    raise SystemExit(f"pass {pass_} has other captions than version 0.2.0")
        for process in versions.values():
            process.communicate()
        print(f"{arguments.rounds + 1} passes of {arguments.captions} captions: all as version 0.2.0's")
        for own in rates.values():
            print_rates("", "captions/s", dict(sorted(own.items())))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        main()
