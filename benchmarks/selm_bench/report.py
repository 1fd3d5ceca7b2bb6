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


def limit(result, comparison):
    """What the ratio would be if ours took no longer than its counted FLOPs and bytes at the measured peaks; None: not known."""
    if not comparison["peer"] or comparison["key"] == "pss_bytes":
        return None
    ours = [sample for sample in result["samples"].get(comparison["ours"], []) if "roofline_share" in sample]
    least = [sample["roofline_s"] for sample in result["samples"].get(comparison["peer"], []) if "roofline_s" in sample]
    values = ratios(result, comparison)
    if not ours or len(ours) != len(values):
        return None
    if least:  # ours on fewer ranks, at the roofline too
        return statistics.median(least) / statistics.median(sample["roofline_s"] for sample in ours)
    return statistics.median(value / sample["roofline_share"] for value, sample in zip(values, ours))


def limit_text(result, comparison):
    value = limit(result, comparison)
    return "" if value is None else f"{value:.2f}"


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
    return f"other processes meanwhile {during:.2f} cores at most" + ("; **the machine was busy**" if during > machine.BUSY_CORES else "")


def machine_text(hardware):
    return f"{hardware['cpu']}, {hardware['cores']} cores ({', '.join(hardware['features'])}), {hardware['memory_gib']} GiB"


def machine_name(hardware):
    """Short: the CPU and the widest vectors it has."""
    return " ".join([hardware["cpu"], *hardware["features"][-1:]])


def each(result, key):
    """What the runs of a result say, each once, in their order."""
    return list(dict.fromkeys(run[key] for run in result["runs"]))


def peaks_text(result):
    peaks = [run["roofline"] for run in result["runs"] if "roofline" in run]
    if not peaks:
        return []
    between = lambda values, form: " to ".join(dict.fromkeys(format(value / 1e9, form) for value in (min(values), max(values))))
    of, where = (peaks[0]["device"], "in products of large matrices") if "device" in peaks[0] else (f"{peaks[0]['ranks']} cores at once", "in registers")
    return [f"Peaks of {of}, measured in the same runs: {between([p['flops'] for p in peaks], '.0f')} GF/s {where}, "
            f"{between([p['bytes'] for p in peaks], '.1f')} GB/s of memory."]


def work_table(result):
    key, commands = result["key"], each(result, "command")
    lines = [f"# {result['what']}",
             f"{machine_text(result['hardware'])}; {load_text(result)}.",
             f"{', '.join(each(result, 'when'))}, commit {', '.join(each(result, 'commit'))}; {'; '.join(each(result, 'versions'))}.",
             f"`{commands[0]}`" + (f" and {len(result['runs']) - 1} more runs added to it" if len(result["runs"]) > 1 else "")
             + "; median (lowest to highest). Sides take turns within a run, short ones after a warm-up.", "",
             f"| | {result['unit']} | runs | proportional set size GiB | peak resident GiB |", "|---|---|---|---|---|"]
    for name, samples in result["samples"].items():
        if samples:
            lines.append(f"| {name} | {spread(samples, key)} | {len(samples)} | {spread(samples, 'pss_bytes', GIB)} | {spread(samples, 'peak_rss_bytes', GIB)} |")
    lines += [f"| {name} | not run: {reason} | | | |" for name, reason in result["left_out"].items()]
    lines += ["", "| ours | against | ratio | target | | at the roofline |", "|---|---|---|---|---|---|"]
    for comparison in result["comparisons"]:
        median, low, high, verdict = judge(result, comparison)
        value = shown(median, comparison) + (f" ({shown(low, comparison)} to {shown(high, comparison)})" if median is not None else "")
        lines.append(f"| {comparison['ours']}: {comparison['phase']} | {comparison['peer_text'] or comparison['peer']} | {value} | {target_text(comparison)} | {verdict} | {limit_text(result, comparison)} |")
    lines += ["", *result["notes"], *peaks_text(result)]
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
             "| phase | dtype | against | target | reached (lowest to highest) | | at the roofline | runs | machine |", "|---|---|---|---|---|---|---|---|---|"]
    machines = {}
    for result in results:
        if not result.get("in_summary", True):
            continue
        machines.setdefault(machine_name(result["hardware"]), (machine_text(result["hardware"]), set()))[1].update(each(result, "commit"))
        busy = "busy" if others(result) > machine.BUSY_CORES else "quiet"
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
            lines.append(f"| {comparison['phase']} | {result['dtype']} | {comparison['peer_text'] or comparison['peer']} | {target_text(comparison)} | {reached} | {verdict} | {limit_text(result, comparison)} | "
                         f"{runs} | {machine_name(result['hardware'])}, {busy} |")
    lines += ["", *(f"{name}: {text}; commits {', '.join(sorted(commits))}." for name, (text, commits) in machines.items()),
              "Runs: ours, the peer. Shares: of the least time that counted FLOPs and bytes allow at the peaks measured in the same run. "
              "At the roofline: the ratio if ours took just that time (of two ranks against one: if both did); what lies above it no program on this machine can reach "
              "without doing less work. Busy: other processes used 0.15 cores or more during a run."]
    return "\n".join(lines) + "\n"
