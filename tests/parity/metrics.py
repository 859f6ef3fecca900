"""Evaluators and the reading of judges' replies against recorded outputs; so far `unifiedreward_parse`, other files are reported as not covered yet."""
import json
import math
from pathlib import Path

from camflow.rewards.camera import answer_text, parse_answer, unified_score
from camflow.rewards.judge import read_as

LINE = 1e-12
NEVER = (math.nan, 0.0, 0.0, None)


def point_scores(text: str) -> dict:
    "The published readers of point scores, under the names of the record."
    axes, mean = read_as(text, "verl_omni")
    return {"axes_by_documented_line (derived)": read_as(text, "documented"), "mixgrpo_alignment": read_as(text, "mixgrpo"),
            "mixgrpo_final": read_as(text, "mixgrpo_final"), "verl_omni_axes": axes, "verl_omni_normalised_raw": mean,
            "flow_grpo_final_score": read_as(text, "flow_grpo")}


def answer_tag(text: str) -> dict:
    "CameraFlow's reader of <answer> tags, and UnifiedReward-Think's."
    inside, value = answer_text(text), parse_answer(text)
    return {"seed_extracted": inside, "seed_float": value, "seed_status": "no_content" if not inside else "not_a_float" if value is None else "ok",
            "seed_score_after_3_identical_replies": unified_score(lambda: text)["score"], "think_official_extract_answer": read_as(text, "think")}


PARSERS = {f.__name__: f for f in (point_scores, answer_tag)}


def difference(got, want) -> float:
    "Largest difference of the numbers; inf where anything else differs. The strings nan and inf stand for numbers where a number was given."
    if isinstance(want, dict):
        return max((difference(got[k], v) for k, v in want.items()), default=0.0) if isinstance(got, dict) and set(got) == set(want) else math.inf
    if isinstance(want, list): return max(map(difference, got, want), default=0.0) if isinstance(got, list) and len(got) == len(want) else math.inf
    if isinstance(got, float) and want is not None:
        want = float(want)
        return 0.0 if got == want or (math.isnan(got) and math.isnan(want)) else abs(got - want) if math.isfinite(got - want) else math.inf
    return 0.0 if got == want else math.inf


def check(folder) -> dict:
    "{case: (worst difference, atol, rtol, ok)}; ok is None for what nothing here covers yet."
    out = {}
    for path in sorted(Path(folder).iterdir()):
        if path.stem == "unifiedreward_parse":
            for name, rows in json.loads(path.read_text()).items():
                worst = max(difference(PARSERS[name](row["input"]), row["output"]) for row in rows) if name in PARSERS else math.nan
                out[f"unifiedreward_parse.{name}"] = (worst, LINE, 0.0, worst <= LINE) if name in PARSERS else NEVER
        elif path.suffix in (".json", ".safetensors") and not path.stem.startswith("shapes_"): out[path.stem] = NEVER
    return out
