"""Rows as Markdown tables."""

from collections.abc import Sequence
from typing import Any


def format_markdown(machine: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown tables, below a line that describes the machine."""
    place = machine["gpu"] or f"{machine['threads']} threads of {machine['processor']}"
    lines = [f"{machine['date']}, {place}, torch {machine['torch']}, commit {machine['commit']}", ""]
    for row in rows:
        lines += [f"**{row['title']}**", ""]
        if "missing" in row:
            lines.append(f"not measured: {row['missing']}")
        elif "ways" in row:
            on_gpu = any("bytes" in way for way in row["ways"].values())
            lines += [
                "| way | images/s | times as fast (quartiles) | first call |" + " memory, MiB |" * on_gpu,
                "|---|---|---|---|" + "---|" * on_gpu,
            ]
            for name, way in row["ways"].items():
                low, high = way["quartiles"]
                line = (
                    f"| {name} | {way['images_per_second']:.1f} | {way['ratio']:.2f} ({low:.2f} to {high:.2f}) "
                    f"| {way['first_seconds']:.1f} s |"
                )
                lines.append(line + (f" {way['bytes'] / 2**20:.0f} |" if "bytes" in way else ""))
        elif "points" in row:
            lines += [
                "| network | input | time, ms | / linear | activations, MiB | / linear |",
                "|---|---|---|---|---|---|",
            ]
            for name, points in row["points"].items():
                for point in points:
                    lines.append(
                        f"| {name} | {point['size']} "
                        f"| {1e3 * point['seconds']:.3g} | {point['seconds_over_linear']:.2f} "
                        f"| {point['bytes'] / 2**20:.0f} | {point['bytes_over_linear']:.2f} |"
                    )
        elif "parts" in row:
            lines += ["| part | GFLOP/s | GB/s | FLOP a byte |", "|---|---|---|---|"]
            for name, part in row["parts"].items():
                speed, memory = part["flops"] / part["seconds"] / 1e9, part["bytes"] / part["seconds"] / 1e9
                lines.append(f"| {name} | {speed:.0f} | {memory:.1f} | {part['flops'] / part['bytes']:.1f} |")
        else:
            lines += ["| | seconds |", "|---|---|"]
            lines += [f"| {name} | {seconds:.3g} |" for name, seconds in row["seconds"].items()]
        lines.append("")
    return "\n".join(lines)
