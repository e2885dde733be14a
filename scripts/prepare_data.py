"""Convert, clean and split data files before training.

    python scripts/prepare_data.py --in raw/*.csv --out rows.jsonl --deduplicate --split 0.1
    python scripts/prepare_data.py --in chat.parquet --to sharegpt --out chat.json
    python scripts/prepare_data.py --in dump.jsonl --columns query=question reply=answer --to messages --out rows.jsonl.gz
    python scripts/prepare_data.py --in train.jsonl --against test.jsonl --out unseen.jsonl
    python scripts/prepare_data.py --in HuggingFaceH4/no_robots --to messages --out rows.jsonl

Reads JSONL, JSON, CSV and Parquet (also .gz) and hub datasets, in any mixture of the formats that recipes read, and checks
every row. The suffix of --out says what is written; CSV and Parquet hold lists as JSON text. Nothing is overwritten, and
nothing is written unless all rows are good. Without --to each row keeps its format. Columns that no format reads travel
along. --split writes a second file, rows_eval.jsonl beside rows.jsonl; rows with the same prompt go to the same side.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from config.structured_config import FormatName
from utils import cli

FORMATS = get_args(FormatName)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prepares the rows and prints what was done; returns the exit code."""
    parser = cli.make_parser(__doc__)
    parser.add_argument(
        "--in",
        nargs="+",
        required=True,
        type=cli.read_name,
        metavar="FILE",
        dest="sources",
        help="files, globs or hub ids",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="file to write; must not exist")
    parser.add_argument("--to", choices=FORMATS, help="format to write (default: as it is)")
    parser.add_argument("--format", choices=("auto", *FORMATS), default="auto", help="format to read (default: auto)")
    parser.add_argument("--columns", nargs="+", default=[], type=read_pair, metavar="OLD=NEW", help="rename columns")
    parser.add_argument("--split", default=0.0, type=float, metavar="SHARE", help="share for FILE_eval, such as 0.1")
    parser.add_argument("--deduplicate", action="store_true", help="leave out rows that repeat an earlier one")
    what = "leave out rows that stand in these"
    parser.add_argument("--against", nargs="+", default=[], type=cli.read_name, metavar="FILE", help=what)
    parser.add_argument("--seed", type=int, default=42, help="of the split (default: 42)")
    options = parser.parse_args(arguments)
    if not 0 <= options.split < 1:
        parser.error("--split is a share between 0 and 1")

    from utils.data_preparation import Order, format_prepared, prepare_rows, speak_of_options

    order = Order(
        sources=options.sources,
        target=options.out,
        to=options.to,
        format=options.format,
        columns=dict(options.columns),
        split=options.split,
        deduplicate=options.deduplicate,
        against=options.against,
        seed=options.seed,
    )
    with speak_of_options():
        prepared = prepare_rows(order)
    for line in format_prepared(order, prepared):
        print(line)
    return 0


def read_pair(text: str) -> tuple[str, str]:
    """`old=new` as a pair."""
    old, equals, new = text.partition("=")
    if not (old and equals and new):
        raise argparse.ArgumentTypeError(f"{text!r} is not OLD=NEW")
    return old, new


if __name__ == "__main__":
    cli.run(main)
