"""Measure .mfac files without decoding them: python -m meanflow_audio_codec.tools.info FILE... [--json]

Printed are the fields of the header, the length, and the measured sizes and bitrates. All checksums are verified, so
that it also tells whether a file is whole: the exit status is 1 if one is not. No codec is needed.
"""

import argparse
import contextlib
import dataclasses
import json
import sys

from meanflow_audio_codec import bitstream
from meanflow_audio_codec.errors import InputError
from meanflow_audio_codec.tools import files


def main(argv: list[str] | None = None) -> None:
    """Measure what the command line names."""
    parser = argparse.ArgumentParser(
        prog="info", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("inputs", nargs="+", metavar="FILE", help=".mfac file, or - for standard input")
    parser.add_argument("--json", action="store_true", help="an object a line for each file")
    arguments = parser.parse_args(argv)
    with files.errors_as_lines("info"):
        files.process("info", [(source,) for source in arguments.inputs], lambda source: _show(source, arguments.json))


def _show(source: str, as_json: bool) -> None:
    with contextlib.nullcontext(sys.stdin.buffer) if source == files.STREAM else open(source, "rb") as file:
        measured = bitstream.info(file, files.name_of(source))
    fields = {"file": source} | dataclasses.asdict(measured.pop("header")) | measured
    fields["framing_bytes"] = measured["total_bytes"] - measured["header_bytes"] - measured["payload_bytes"]
    if as_json:
        print(json.dumps(fields))
    else:
        rows = [(name, value) for name, value in fields.items() if name != "lost"]
        print("\n".join(f"{name:15} {_written(value)}" for name, value in rows), end="\n\n")
    if lost := measured["lost"]:
        raise InputError(f"damaged: {lost[0]}" + (f", and {len(lost) - 1} more faults" if len(lost) > 1 else ""))


def _written(value: object) -> str:
    """A number as people read it; what is not known as `?`."""
    if value is None:
        return "?"
    return f"{value:.3f}" if isinstance(value, float) else files.printable(str(value)) or "-"


if __name__ == "__main__":
    main()
