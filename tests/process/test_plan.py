"""What `tprt plan` predicts for CPU ranks is what a deployment of them then holds."""

from __future__ import annotations

from launch import LLM, SamplingParams
from launch.config_file import load_config
from launch.planning.plan import plan_deployment
from tests.support.deployments import TinyDeployment


def test_two_unequal_ranks_have_the_kv_blocks_that_were_planned(tiny: TinyDeployment) -> None:
    settings = ["cache.num_blocks=null", "cache.cpu_memory_gib=0.001", "parallel.rank_weights=[1, 2]"]
    planned = plan_deployment(load_config(tiny.config, settings))
    with LLM(tiny.config, settings) as llm:
        assert llm.ready.num_blocks == planned.num_blocks


def test_cpu_ranks_with_weights_to_be_found_out_have_equal_shares_and_work(tiny: TinyDeployment) -> None:
    with LLM(tiny.config, ["parallel.rank_weights=auto"]) as llm:
        params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
        output = llm.generate([5, 6, 7], params)[0].outputs[0]
    assert output.token_ids == tiny.expected([5, 6, 7], 4)
