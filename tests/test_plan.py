"""Recipes and what `megatron-dmc plan` makes of them."""

import argparse
import json
import shlex

import pytest
import yaml
from runs import ROOT, dmc

from megatron_dmc.commands.plan import GIB, make_plan
from megatron_dmc.config import STAGES, DMCError
from megatron_dmc.recipe import Recipe, add_arguments, resolve

RECIPES = sorted((ROOT / "examples" / "recipes").glob("*.yaml"))
TINY = dict(
    compression=4,
    checkpoints=dict(original="base", output="out"),
    model={
        "num-layers": 4, "hidden-size": 64, "ffn-hidden-size": 160, "num-attention-heads": 4,
        "group-query-attention": True, "num-query-groups": 2, "max-position-embeddings": 32, "swiglu": True,
        "position-embedding-type": "rope", "normalization": "RMSNorm", "disable-bias-linear": True,
        "untie-embeddings-and-output-weights": True, "attention-dropout": 0, "hidden-dropout": 0,
        "padded-vocab-size": 100,
    },
    data={"seq-length": 32, "mock-data": True, "tokenizer-type": "NullTokenizer", "vocab-size": 99},
    training={"global-batch-size": 16, "micro-batch-size": 2, "bf16": True, "use-distributed-optimizer": True,
              "save-interval": 100},
    layouts={4: {"tensor-model-parallel-size": 2, "sequence-parallel": True},
             8: {"tensor-model-parallel-size": 2, "sequence-parallel": True, "pipeline-model-parallel-size": 2}},
    stages={
        "zero-out": {"train-iters": 10, "lr": 1e-5},
        "retrofit": {"train-iters": {2: 100, 4: 200}, "lr": 1e-5},
        "finetune": {"train-iters": 50, "lr": 1e-5},
    },
)  # fmt: skip


def options(recipe, *arguments):
    parser = add_arguments(argparse.ArgumentParser())
    parsed = parser.parse_args([str(recipe), *map(str, arguments)])
    vars(parsed).update(gpu_tflops=989.0, mfu=0.4, gpu_memory_gib=79.0, json=False)
    return parsed


@pytest.fixture
def tiny(tmp_path):
    def write(**parts):
        (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY | parts))
        return tmp_path / "tiny.yaml"

    return write


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_what_megatron_takes(path):
    """Every layout, on its smallest number of GPUs and on four times as many; parameters as published."""
    published = {
        "llama-2-7b": 6_738_415_616, "llama-2-70b": 68_976_648_192, "llama-3.1-8b": 8_030_261_248,
        "llama-3.1-70b": 70_553_706_496, "qwen2.5-7b": 7_615_616_512 - 28 * (3584 + 2 * 512),  # without QKV biases
    }  # fmt: skip
    for gpus in Recipe.read(path).layouts:
        for n in (gpus, 4 * gpus):
            plan = make_plan(options(path, "--gpus", n))
            assert plan.memory.total < 0.9 * 79 * GIB
            assert plan.layout["global_batch_size"] * plan.layout["sequence_length"] == 1024 * 4096
            for stage, args in plan.args.items():
                assert (args.dmc_stage, args.dmc_cr) == (stage, 4.0)
    for ratio in (2, 4, 8):
        commands = resolve(options(path, "--gpus", 64, "--compression", ratio)).commands
        assert [command.iterations for command in commands] == [250, 3000 * ratio, 2000]
    one = [f"--set={dimension}-model-parallel-size=1" for dimension in ("tensor", "pipeline")]
    one += ["--set=num-layers-per-virtual-pipeline-stage=false", "--set=recompute-granularity=full"]
    whole = options(path, "--gpus", 64, *one, "--set=recompute-method=uniform", "--set=recompute-num-layers=1")
    whole.gpu_memory_gib = 10_000
    plan = make_plan(whole)
    assert plan.memory.weights / 2 == pytest.approx(published[path.stem], rel=1e-9)
    # Six operations for every token and parameter outside of the embedding's lookup, and attention's scores.
    args = plan.args["retrofit"]
    matrices = (
        published[path.stem] - args.padded_vocab_size * args.hidden_size - (2 * args.num_layers + 1) * args.hidden_size
    )
    scores = args.num_layers * args.seq_length * args.num_attention_heads * args.kv_channels
    assert plan.flops["retrofit"] == pytest.approx(1024 * 4096 * 6 * (matrices + scores), rel=1e-9)


def test_a_plan_computed_by_hand(tiny):
    """Eight GPUs: tensor 2 with sequence, pipeline 2, data 2; h = 64, kv = 32, f = 160, 32 × 2 tokens."""
    plan = make_plan(options(tiny(), "--gpus", 8))
    assert plan.layout["data_parallel"] == 2 and plan.layout["micro_batches"] == 4
    layer = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 160  # queries and output, keys and values, MLP
    parameters = (2 * layer + 100 * 64) / 2 + (4 * 2 * 64 + 64) / 2  # two of four layers, one embedding; norms
    assert plan.memory.weights == pytest.approx(2 * parameters)
    assert plan.memory.gradients == pytest.approx(4 * parameters)
    assert plan.memory.optimizer == pytest.approx(12 / 2 * parameters)
    token = (8 * 64 + 2 * 64 + 4 * 32 + 2 * 64 + 6 * 160) / 2
    assert plan.memory.activations == pytest.approx(2 * 2 * 64 * token)  # two micro-batches in flight, two layers each
    assert plan.memory.dmc == pytest.approx(2 * 2 * 64 * (4 * 32 + 8 * 4 + 8 * 2) / 2)
    matrices = 4 * layer + 100 * 64
    flops = 16 * 32 * (6 * matrices + 6 * 4 * 32 * 64)
    assert plan.flops == dict.fromkeys(STAGES, pytest.approx(flops))
    assert plan.tokens == {"zero-out": 5_120, "retrofit": 102_400, "finetune": 25_600}
    assert plan.hours["retrofit"] == pytest.approx(200 * flops / (0.4 * 989e12) / 3600)

    # Context parallelism shares out the tokens, and the optimizer's state as data parallelism does.
    context = ["--set=context-parallel-size=2", "--set=cp-comm-type=a2a"]
    with pytest.raises(DMCError, match="context_parallel_size = 2"):  # two KV heads, two tensor-parallel ranks
        make_plan(options(tiny(), "--gpus", 8, *context))
    split = make_plan(options(tiny(), "--gpus", 8, *context, "--set=tensor-model-parallel-size=1"))
    alone = make_plan(options(tiny(), "--gpus", 4, "--set=pipeline-model-parallel-size=2",
                              "--set=tensor-model-parallel-size=1"))  # fmt: skip
    assert split.layout["data_parallel"] == alone.layout["data_parallel"] == 2
    assert split.memory.activations == pytest.approx(alone.memory.activations / 2)
    assert split.memory.optimizer == pytest.approx(alone.memory.optimizer / 2)

    # A teacher: weights in bf16 and twice the logits, and a forward pass more.
    taught = make_plan(options(tiny(), "--gpus", 4, "--set=dmc-teacher=checkpoints/base"))
    without = make_plan(options(tiny(), "--gpus", 4))
    with pytest.raises(DMCError, match="--dmc-teacher does not go with --pipeline-model-parallel-size above 1"):
        make_plan(options(tiny(), "--gpus", 8, "--set=dmc-teacher=checkpoints/base"))
    logits = taught.layout["micro_batch_size"] * taught.layout["sequence_length"] * 100 / 2
    assert taught.memory.teacher == pytest.approx(taught.memory.weights + 24 * logits) and without.memory.teacher == 0
    assert taught.flops["retrofit"] == pytest.approx(without.flops["retrofit"] * 4 / 3)
    assert "teacher" in taught.as_text() and "teacher" not in without.as_text()

    # Full recomputation keeps the inputs of layers, and one layer's activations while it computes them again. What is
    # left then is most on the last stage, which has the logits.
    full = make_plan(options(tiny(), "--gpus", 8, "--set=recompute-granularity=full",
                             "--set=recompute-method=uniform", "--set=recompute-num-layers=1"))  # fmt: skip
    assert full.memory.activations == pytest.approx(2 * 64 * 2 * 64 / 2 + 64 * token + 64 * 6 * 100 / 2)


def test_commands_of_a_plan(tiny):
    launch = resolve(options(tiny(), "--gpus", 16, "--set=retrofit.lr=3e-5", "--set=lr=2e-5", "--set=bf16=false",
                             "--set=data-path=[0.5, a b, 0.5, c]", "--checkpoint", "my model"))  # fmt: skip
    for command, stage, start, folder in zip(
        launch.commands, STAGES, ("my model", "out/zero-out", "out/retrofit-4x"),
        ("out/zero-out", "out/retrofit-4x", "out/finetune-4x"), strict=True,
    ):  # fmt: skip
        words = command.words()
        assert " ".join(words).startswith("torchrun --nnodes 2 --nproc-per-node 8 ")
        assert words[words.index("--pretrained-checkpoint") + 1] == start
        assert words[words.index("--load") + 1] == words[words.index("--save") + 1] == folder
        assert words[words.index("--dmc-stage") + 1] == stage
        assert words[words.index("--lr") + 1] == ("3e-5" if stage == "retrofit" else "2e-5")
        at = words.index("--data-path")
        assert words[at + 1 : at + 5] == ["0.5", "a b", "0.5", "c"] and "--bf16" not in words
        assert shlex.split(command.shell().replace("\\\n", "")) == words
        assert '--rdzv-endpoint "$RDZV_ENDPOINT"' in command.shell()
        assert max(map(len, command.shell().splitlines())) <= 120
    (alone,) = resolve(options(tiny(), "--gpus", 4, "--stage", "finetune", "--compression", 2)).commands
    assert alone.words()[1] == "--standalone" and alone.begins_from == "out/retrofit-2x"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--gpus 2", "tiny has layouts from 4 GPUs on; got 2"),
        ("--gpus 12", "12 GPUs do not fill nodes of 8: use 8 or 16"),
        ("--gpus 6", "does not divide among 3 data-parallel replicas (6 GPUs, 2 each): use 4 or 8 GPUs"),
        ("--gpus 5", "takes 2 GPUs (tensor-model-parallel-size 2), which 5 GPUs do not divide into"),
        ("--gpus 12 --gpus-per-node 4 --set=num-experts=8 --set=expert-model-parallel-size=8 "
         "--set=tensor-model-parallel-size=1 --set=pipeline-model-parallel-size=1 --set=global-batch-size=24",
         "takes 8 GPUs (pipeline-model-parallel-size 1 × expert-model-parallel-size 8 × expert-tensor-parallel-size 1, "
         "unless given the tensor-model-parallel-size), which 12 GPUs do not divide into: use a multiple of 8"),
        ("--gpus 8 --set=pipeline-model-parallel-size=1 --set=num-experts=8 --set=expert-model-parallel-size=8",
         "one replica of the experts takes 16 GPUs"),
        ("--gpus 0", "--gpus and --gpus-per-node must be at least 1; got 0 and 8"),
        ("--gpus 4 --gpus-per-node 0", "--gpus and --gpus-per-node must be at least 1; got 4 and 0"),
        ("--gpus 4 --set lr=[", "--set lr=[: the value is no YAML ("),
        ("--gpus 4 --set padded-vocab-size=false --set vocab-size=false", "a plan must know the vocabulary"),
        ("--gpus 4 --compression 3", "retrofit: train-iters is given for the ratios 2, 4; got 3"),
        ("--gpus 4 --compression 0.5", "must be a number of at least 1; got 0.5"),
        ("--gpus 4 --set dmc-cr=2", "sets dmc-cr, which follows from the recipe: change it with --compression"),
        ("--gpus 4 --set lr=", "--set lr= gives lr no value"),
        ("--gpus 4 --set global-batch-size=1", "replicas (4 GPUs, 2 each): change global-batch-size"),
        ("--gpus 4 --set warmup.lr=1", "--set takes FLAG=VALUE or STAGE.FLAG=VALUE"),
        ("--gpus 4 --set micro-batch-size=many", "micro-batch-size must be a whole number of at least 1; got 'many'"),
        ("--gpus 4 --set learning-rate=1", "Megatron has no such arguments: unrecognized arguments: --learning-rate 1"),
        ("--gpus 4 --set num-query-groups=1", "tensor_model_parallel_size = 2 (ranks share out 1 KV heads"),
        ("--gpus 4 --set attention-dropout=0.1", "attention_dropout = 0.1"),
        ("--gpus 4 --set pipeline-model-parallel-size=4 --set tensor-model-parallel-size=1 --set num-layers=6",
         "Megatron refuses the arguments of zero-out: Number of layers should be divisible"),
        ("--gpus 4 --set dmc-window-size=-1", "dmc_window_size must be a whole number of tokens"),
        ("--gpus 4 --set tensor-parallel-num-weight-shards=4", "gtp_weight_remat_size = 2 (ranks have parts"),
        ("--gpus 4 --set sft=true", "--sft needs the data sets"),
        ("--gpus 4 --set dataloader-inter-document-masking=true --set pipeline-model-parallel-size=2",
         "use --micro-batch-size 1"),
        ("--gpus 4 --set=tensor-model-parallel-size=1 --set=context-parallel-size=2 --set=cp-comm-type=all_gather "
         "--set=dmc-window-size=0", "--dmc-window-size 0: with --cp-comm-type all_gather"),
        ("--gpus 8 --set hidden-size=65536 --set ffn-hidden-size=262144", "GiB per GPU"),
        ("--gpus 8 --set pipeline-model-parallel-size=4 --set num-layers=16 --set global-batch-size=12 "
         "--set num-layers-per-virtual-pipeline-stage=2", "takes multiples of 4 micro-batches; each replica has 6"),
    ],
)  # fmt: skip
def test_refusals(tiny, flags, message):
    with pytest.raises(DMCError) as refused:
        make_plan(options(tiny(), *flags.split()))
    assert message in str(refused.value)


@pytest.mark.parametrize("name", ["gpu_tflops", "mfu", "gpu_memory_gib"])
def test_assumptions_are_above_0(tiny, name):
    asked = options(tiny(), "--gpus", 4)
    setattr(asked, name, 0.0)
    with pytest.raises(DMCError, match=f"--{name.replace('_', '-')} must be above 0; got 0.0"):
        make_plan(asked)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (dict(layouts={}), "the keys of layouts must be numbers of GPUs"),
        (dict(layouts={"eight": {}}), "the keys of layouts must be numbers of GPUs; got eight"),
        (dict(stages={"retrofit": {}}), "stages must be zero-out, retrofit, finetune; got retrofit"),
        (dict(checkpoints={"original": "x"}), "checkpoints must be original, output; got original"),
        (dict(optimizer={}), "must have the parts compression, checkpoints"),
        (dict(data={"load": "x"}), "sets load, which follows from the recipe: change it with --checkpoint"),
        (dict(data={"bf16": True}), "bf16 stands in more than one of model, data and training"),
        (dict(model=[1]), "model must hold `key: value` lines; got [1]"),
        (dict(layouts={8: [1]}), "layouts: 8 must hold `flag: value` lines; got [1]"),
        (dict(stages=TINY["stages"] | {"finetune": 5}), "stages: finetune must hold `flag: value` lines; got 5"),
    ],
)
def test_mistakes_in_a_recipe(tiny, parts, message):
    with pytest.raises(DMCError) as refused:
        Recipe.read(tiny(**parts))
    assert message in str(refused.value)


def test_the_command(tiny):
    run = dmc("plan", tiny(), "--gpus", 8, "--json")
    assert run.code == 0, run.output
    plan = json.loads(run.output[run.output.index("{\n") :])
    assert [stage["stage"] for stage in plan["stages"]] == list(STAGES)
    assert plan["tokens"] == 133_120 and plan["layout"]["pipeline_parallel"] == 2
    assert plan["estimated_bytes_per_gpu"]["total"] == sum(list(plan["estimated_bytes_per_gpu"].values())[:-1])
    text = make_plan(options(tiny(), "--gpus", 8)).as_text()
    assert "estimate" in text and all(stage["shell"] in text for stage in plan["stages"])
    for command in ("plan", "run"):
        run = dmc(command, "--help")
        assert run.code == 0 and "examples" in run.output and f"megatron-dmc {command}" in run.output
    run = dmc("plan", "nowhere.yaml", "--gpus", 8)
    assert run.code != 0 and "cannot read the recipe nowhere.yaml" in run.output and "Traceback" not in run.output
