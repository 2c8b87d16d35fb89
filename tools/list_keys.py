"""List every flag and every configuration key, as the page docs/configuration.md does.

python -m tools.list_keys                               print the page
python -m tools.list_keys --out docs/configuration.md   write it, after a card has changed
"""

import argparse
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from configs.arguments import OneLineParser, make_parser
from configs.commands import CommandParser, command
from configs.keys import KEYS, RETIRED_KEYS, Key
from tasks import TASKS, keys_of

INTRODUCTION = """\
# Configuration

After this page you can find every flag and every key, its default, and whether it may change when a run continues.
`python -m tools.list_keys` writes this page from the cards in `configs/keys.py` and in each task's `keys.py`.

Later wins: defaults, files named in `BASE`, the YAML files of `--cfg` in their order, `--opts KEY VALUE`, flags.
Everything is checked before anything is built. A mistake is one line that names key, value and the nearest valid name.

Each key belongs to one of four things:

| belongs to | may change when a run continues | may differ between processes | kept with the weights |
|---|---|---|---|
| network | no | no | yes |
| recipe | no | no | no |
| launch | yes | no | no |
| process | yes | yes | no |
"""

RETIRED = """\
## Keys of released files

Released YAML files work unchanged. These keys decide nothing any more; they are named and ignored.
"""


def page() -> str:
    """The whole page, Markdown."""
    parts = [INTRODUCTION, "## Flags of train.py and test.py\n", *_flags(), "## Keys of all tasks\n", *_table(KEYS)]
    for task in TASKS:
        own = {name: key for name, key in keys_of(task).items() if KEYS.get(name) != key}
        about = "These it has beside those above, or with another default:\n"
        parts += [f"## Keys of {task}\n", about, *_table(own)]
    retired = [f"- `{name}`: {reason}" for name, reason in RETIRED_KEYS.items()]
    return "\n".join([*parts, RETIRED, *retired]) + "\n"


def _flags() -> Iterator[str]:
    parser = make_parser(KEYS | keys_of("classification"), OneLineParser())
    yield "| flag | meaning (key, default) |\n|---|---|"
    for action in parser._actions:
        arguments = " ".join(parser._get_formatter()._format_args(action, "").split())
        flag = f"{', '.join(action.option_strings)} {arguments}".strip()
        yield f"| `{_cell(flag)}` | {_text((action.help or '') % {})} |"
    yield ""


def _table(keys: Mapping[str, Key]) -> Iterator[str]:
    yield "| key | default | meaning | values | belongs to |\n|---|---|---|---|---|"
    for name, key in keys.items():
        demands = "; ".join(re.sub(r"^must (be )?| = {[\w.]+}", "", rule.demand) for rule in key.rules)
        yield f"| `{name}` | `{_cell(repr(key.default))}` | {_text(key.meaning)} | {_text(demands)} | {key.scope} |"
    yield ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|")  # which would begin the next cell


def _text(text: str) -> str:
    return _cell(text).replace("<", "&lt;")  # which would begin a tag


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser("tools.list_keys", __doc__)
    parser.add_argument("--out", metavar="FILE", type=Path, help="write the page there; default: print it")
    return parser.parse_args(argv)


@command("tools.list_keys")
def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    if args.out:
        args.out.write_text(page())
    else:
        print(page(), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
