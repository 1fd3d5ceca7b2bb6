"""Tables: one per result, and the summary of all."""

import json
import os
import statistics

from . import machine

GIB = 1 << 30


def ratios(result, comparison):
    """A value per repetition of ours: by the peer's of the same repetition (its last, where it has fewer), or the number itself."""
    key = comparison["key"]
    ours = [sample[key] for sample in result["samples"].get(comparison["ours"], []) if key in sample]
    if not comparison["peer"]:
        return ours
    peer = [sample[key] for sample in result["samples"].get(comparison["peer"], []) if key in sample]
    if not peer:
        return []
    return [value / peer[min(i, len(peer) - 1)] for i, value in enumerate(ours)]


def judge(result, comparison):
    """(median or None, lowest, highest, "met" | "not met" | "" without a target | "not measured")"""
    values = ratios(result, comparison)
    if not values:
        return None, None, None, "not measured"
    median, target = statistics.median(values), comparison.get("target")
    if target is None:
        verdict = ""
    elif comparison.get("at_most"):
        verdict = "met" if median <= target else "not met"
    else:
        verdict = "met" if median >= target else "not met"
    return median, min(values), max(values), verdict


def is_share(comparison):
    return comparison["key"].endswith("_share")


def shown(value, comparison):
    if value is None:
        return "-"
    if is_share(comparison):
        return f"{100 * value:.0f} %"
    return f"{value:.2f}" if comparison["peer"] else f"{value:.3g}"


def target_text(comparison):
    if comparison.get("target") is None:
        return ""
    return ("<= " if comparison.get("at_most") else ">= ") + (f"{100 * comparison['target']:.0f} %" if is_share(comparison) else f"{comparison['target']:g}")


def spread(samples, key, scale=1.0):
    values = [sample[key] / scale for sample in samples if sample.get(key)]
    if not values:
        return ""
    return f"{statistics.median(values):.3g}" + (f" ({min(values):.3g} to {max(values):.3g})" if len(values) > 1 else "")


def others(result):
    return max((sample["others_cores"] for samples in result["samples"].values() for sample in samples), default=0.0)


def load_text(result):
    during = others(result)
    text = f"load before the run {result['load_before']:.2f}, other processes during it {during:.2f} cores at most"
    if during > machine.BUSY_CORES or result["load_before"] > 0.5:
        text += "; **the machine was busy**"
    return text


def work_table(result):
    where, key = result["hardware"], result["key"]
    lines = [f"# {result['what']}",
             f"{where['cpu']}, {where['cores']} cores ({', '.join(where['features'])}), {where['memory_gib']} GiB; {load_text(result)}.",
             f"{result['when']}, commit {result['commit']}; {result['versions']}.",
             f"`{result['command']}`; median (lowest to highest) of runs in turns, after a warm-up.", "",
             f"| | {result['unit']} | runs | proportional set size GiB | peak resident GiB |", "|---|---|---|---|---|"]
    for name, samples in result["samples"].items():
        if samples:
            lines.append(f"| {name} | {spread(samples, key)} | {len(samples)} | {spread(samples, 'pss_bytes', GIB)} | {spread(samples, 'peak_rss_bytes', GIB)} |")
    lines += [f"| {name} | not run: {reason} | | | |" for name, reason in result["left_out"].items()]
    lines += ["", "| ours | against | ratio | target | |", "|---|---|---|---|---|"]
    for comparison in result["comparisons"]:
        median, low, high, verdict = judge(result, comparison)
        value = shown(median, comparison) + (f" ({shown(low, comparison)} to {shown(high, comparison)})" if median is not None else "")
        lines.append(f"| {comparison['ours']}: {comparison['phase']} | {comparison['peer_text'] or comparison['peer']} | {value} | {target_text(comparison)} | {verdict} |")
    lines += ["", *result["notes"]]
    return "\n".join(lines).rstrip() + "\n"


def read_results(directory):
    results = []
    for name in sorted(os.listdir(directory)):
        if name.endswith(".json"):
            with open(os.path.join(directory, name)) as file:
                result = json.load(file)
            if isinstance(result, dict) and "comparisons" in result:
                results.append(dict(result, file=name))
    return results


def summary(directory):
    """Of all results that lie in the directory: what was reached of every target."""
    results = read_results(directory)
    lines = ["# Against peers: what was reached", "Made by `benchmarks/run summary` from the JSON files beside it; each has its own table (.md) with samples, memory and load.", "",
             "| phase | dtype | against | target | reached (lowest to highest) | | runs | machine |", "|---|---|---|---|---|---|---|---|"]
    commits = set()
    for result in results:
        commits.add(result["commit"])
        for comparison in result["comparisons"]:
            median, low, high, verdict = judge(result, comparison)
            if median is None:
                reached = "not measured" + (": " + result["left_out"][comparison["peer"]] if comparison["peer"] in result["left_out"] else "")
                verdict = ""
            else:
                reached = f"{shown(median, comparison)} ({shown(low, comparison)} to {shown(high, comparison)})"
            runs = len(result["samples"].get(comparison["ours"], []))
            if comparison["peer"]:
                runs = f"{runs}, {len(result['samples'].get(comparison['peer'], []))}"
            busy = "busy" if others(result) > machine.BUSY_CORES or result["load_before"] > 0.5 else "quiet"
            lines.append(f"| {comparison['phase']} | {result['dtype']} | {comparison['peer_text'] or comparison['peer']} | {target_text(comparison)} | {reached} | {verdict} | "
                         f"{runs} | {busy} |")
    if results:
        where = results[0]["hardware"]
        lines += ["", f"{where['cpu']}, {where['cores']} cores ({', '.join(where['features'])}), {where['memory_gib']} GiB; commits {', '.join(sorted(commits))}.",
                  "Runs: ours, the peer. Shares: of the least time that counted FLOPs and bytes allow at the peaks measured in the same run."]
    return "\n".join(lines) + "\n"
