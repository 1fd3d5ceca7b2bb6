"""JSON, Markdown and SVG of a scaling study."""

import math

COLOURS = {"generate": "#1f77b4", "rank": "#2ca02c", "logprob": "#9467bd", "train": "#d62728"}


def efficiency(point, base):
    """Of a measured point: work done per rank and second, against one rank in the same mode."""
    if base is None:
        return None
    return point["tokens"] / (point["ranks"] * point["seconds"]) / (base["tokens"] / (base["ranks"] * base["seconds"]))


def base_of(point, points):
    same = [p for p in points if p["phase"] == point["phase"] and p["mode"] == point["mode"]]
    return min(same, key=lambda p: p["ranks"], default=None)


def number(value, form="{:.3g}"):
    return "-" if value is None else form.format(value)


def remarks(point):
    words = []
    if point.get("oversubscribed"):
        words.append("more ranks than cores")
    if point.get("busy"):
        words.append("under load")
    return ", ".join(words)


def measured_table(points):
    text = ("| phase | mode | ranks | nodes | rows | seconds | tokens/s | efficiency | idle | MB moved per rank | model | remark |\n"
            "|---|---|---|---|---|---|---|---|---|---|---|---|\n")
    for p in points:
        text += (f"| {p['phase']} | {p['mode']} | {p['ranks']} | {p['nodes']} | {number(p['batch'] if p['phase'] == 'train' else p['rows'])} | "
                 f"{number(p['seconds'])} | {number(p['tokens'] / p['seconds'], '{:.0f}')} | {number(p['efficiency'], '{:.2f}')} | "
                 f"{number(p['idle'], '{:.1%}')} | {number(p['bytes_moved_per_rank'] and p['bytes_moved_per_rank'] / 1e6)} | "
                 f"{number(p['model_s'])} ({number(p['model_error'], '{:+.0%}')}) | {remarks(p)} |\n")
    return text


def predicted_table(predictions):
    phases = [name for name in COLOURS if name in predictions[0]["phases"]]
    text = "| ranks | nodes |" + "".join(f" {name}, s | efficiency |" for name in phases) + "\n|---|---|" + "---|---|" * len(phases) + "\n"
    for row in predictions:
        text += f"| {row['ranks']} | {row['nodes']} |"
        for name in phases:
            cell = row["phases"][name]
            text += f" {number(cell['seconds'])} | {cell['efficiency']:.2f} |"
        text += "\n"
    return text


def markdown(study):
    where = study["hardware"]
    text = (f"# Scaling\n{where['cpu']} ({', '.join(where['features'])}), {where['cores']} cores, {where['memory_gib']} GiB; {study['when']}, {study['program']}. "
            f"`{study['command']}`\n\nModel {study['model']} ({study['parameters'] / 1e6:.1f} M parameters), {study['dtype']}. Medians of the repetitions; seconds of "
            "training are those of an optimizer step, its rows those of the global batch. Efficiency: tokens per rank and second against "
            "the fewest ranks in the same mode. Idle: the ranks' time without a row; in training, waiting for communication and so for slower "
            "ranks too. Bytes moved: a rank's part of the file, or gradients and weights of a step.\n")
    if any(p.get("busy") for p in study["points"]):
        text += "\n**Points under load were measured beside other work on the machine: their seconds are no measure of the programs.**\n"
    text += "\n## Measured\n" + measured_table(study["points"])
    if study["same_data"] is not None:
        ranks = ", ".join(str(n) for n in study["same_data"]["ranks"])
        text += (f"\nData of all strong-scaling runs are {'equal' if study['same_data']['equal'] else '**NOT equal**'} (digests; ranks {ranks}); losses and gradient norms "
                 f"of their steps differ by {study['largest_loss_difference']:.2g} at most (relative).\n")
    text += "\n## Model\nseconds = fixed + tokens of the busiest rank x seconds per token + communication.\n\n"
    text += "| phase | fixed, s | us per token | GB/s inside a node | parallel share of one rank's time |\n|---|---|---|---|---|\n"
    for name, fit in study["fit"].items():
        text += (f"| {name} | {number(fit['fixed_s'])} | {number(fit['token_s'] * 1e6)} | "
                 f"{number(1e-9 / fit['node_byte_s'] if fit['node_byte_s'] else None)} | {fit['parallel_share']:.3f} |\n")
    if study["not_fitted"]:
        text += f"\nNot fitted, since seconds do not grow with the work in these points: {', '.join(study['not_fitted'])}.\n"
    if study["predictions"]:
        text += ("\n## Predicted\n" + "".join(f"- {line}\n" for line in study["assumptions"]) + "\n" + predicted_table(study["predictions"]))
    return text


def polyline(points, colour, dash=""):
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>\n'


def svg(study):
    """Efficiency over ranks: measured strong-scaling points as dots, predictions as dashed lines."""
    width, height, left, top = 640, 360, 60, 30
    ranks = [p["ranks"] for p in study["points"]] + [p["ranks"] for p in study["predictions"]]
    decades = max(1.0, math.log2(max(ranks)))
    place = lambda n, e: (left + math.log2(n) / decades * (width - left - 20), top + (1.1 - min(e, 1.1)) / 1.1 * (height - top - 50))  # noqa: E731
    out = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" font-size="12">\n'
    out += f'<rect width="{width}" height="{height}" fill="white"/>\n<text x="{left}" y="18">Parallel efficiency over ranks</text>\n'
    for e in (0, 0.25, 0.5, 0.75, 1):
        x, y = place(1, e)
        out += f'<line x1="{x}" y1="{y}" x2="{width - 20}" y2="{y}" stroke="#ddd"/><text x="{x - 35}" y="{y + 4}">{e:g}</text>\n'
    for power in range(int(decades) + 1):
        x, y = place(2**power, 0)
        out += f'<text x="{x - 8}" y="{y + 18}">{2**power}</text>\n'
    for i, (name, colour) in enumerate((n, c) for n, c in COLOURS.items() if n in study["fit"]):
        out += f'<text x="{left + 130 * i}" y="{height - 10}" fill="{colour}">{name}</text>\n'
        line = [place(row["ranks"], row["phases"][name]["efficiency"]) for row in study["predictions"]]
        out += polyline(line, colour, ' stroke-dasharray="5 4"') if line else ""
        for p in study["points"]:
            if p["phase"] == name and p["mode"] == "strong" and p["efficiency"] is not None and not p.get("oversubscribed"):
                x, y = place(p["ranks"], p["efficiency"])
                faint = ' fill-opacity="0.3"' if p.get("busy") else ""
                out += f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"{faint}/>\n'
    return out + "</svg>\n"
