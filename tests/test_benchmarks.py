"Benchmarks: found by name like runs, and their smoke profile leaves the ratios that were promised, with the raw timings beside them."
from pathlib import Path

from camflow.assets import list_profiles, list_runs, run_notebook

ROOT = Path(__file__).resolve().parents[1]
PROMISED = {   # held by the smoke run of each in test_runs
            "rl_cost": ["speedup_vs_flow_grpo", "speedup_vs_cameraflow", "trajectory_memory_ratio", "speedup_vs_flow_grpo_flash", "speedup_vs_cameraflow_flash"], "reward_per_second": ["time_to_reward_ratio", "status"],
            "stereo_speed": ["cpu_ratio", "streaming_ratio", "memory_ratio"], "server_throughput": ["ratio_vs_litserve", "ratio_vs_blocking", "health_p99_ms"],
            "da3_speed": ["cpu_ratio", "reward_ratio", "rays_ratio"], "evaluation_cost": ["cpu_ratio", "memory_ratio", "cache_ratio", "sfm_cpu_seconds"],
            "gmflow_speed": ["cpu_ratio", "memory_ratio"],
            "joint_overhead": ["overhead", "inference_overhead", "train_overhead"],
            "rasteriser_speed": ["ratio_500", "ratio_2k"],
            "gflow_cost": ["cpu_ratio", "pose_ratio", *(f"{arm}_{name}" for name in ("train_psnr", "novel_psnr", "camera_ate", "mask_J_pooled", "track_delta_avg", "track_movers_delta_avg") for arm in ("fast", "paper"))],
            "cache_throughput": ["first_pass_ratio", "repeat_ratio", "attention_ratio", "memory_growth"]}


def test_benchmarks_are_run_notebooks():
    found = {path.stem for path in (ROOT/"nbs/benchmarks").glob("*.ipynb")}
    assert found and found == set(PROMISED) <= set(list_runs()) and (ROOT/"nbs/benchmarks/.notest").exists()
    for name in found: assert run_notebook(name).parent.name == "benchmarks" and {"smoke", "small"} <= set(list_profiles(name))
