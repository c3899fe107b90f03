"""Every graph pass alone and all together: the outputs of the graph before, by onnx's own reference, and less work.

U users, N candidates.
"""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx.reference import ReferenceEvaluator

from export.example_inputs import in_memory
from export.flops import count_flops
from export.optimize import optimize, tidied
from export.passes import PASSES
from tests.export.random_graphs import DIM, HISTORY, ITEM, USER, GraphBuilder, random_graph, random_inputs

SIZES = ((1, 1), (1, 9), (3, 7), (8, 8))  # U, N
BY_NAME = {graph_pass.name: graph_pass.apply for graph_pass in PASSES}


def apply(name: str, model: onnx.ModelProto) -> tuple[onnx.ModelProto, int]:
    """The graph after the pass, and how often it says it rewrote."""
    changed = ir.from_proto(model)
    rewrites = BY_NAME[name](changed)
    return tidied(changed), rewrites


def check_same(before: onnx.ModelProto, after: onnx.ModelProto, seed: int) -> None:
    """Against onnx's reference implementation in numpy, which knows neither ONNX Runtime nor the passes."""
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    reference, session = ReferenceEvaluator(before), in_memory(after)
    names = {node.name for node in session.get_inputs()}
    for users, candidates in SIZES:
        feed = random_inputs(rng, users, candidates)
        expected = reference.run(None, feed)
        found = session.run(None, {name: value for name, value in feed.items() if name in names})
        for one, two in zip(found, expected, strict=True):
            assert one.shape == two.shape
            np.testing.assert_allclose(one, two, atol=2e-5, rtol=2e-5)


def ops(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize("seed", range(12))
def test_a_pass_keeps_what_random_graphs_say(name: str, seed: int) -> None:
    model = random_graph(np.random.default_rng(seed))
    after, _ = apply(name, model)
    check_same(model, after, seed)


@pytest.mark.parametrize("seed", range(30))
def test_all_passes_together(seed: int) -> None:
    model = random_graph(np.random.default_rng(1000 + seed))
    after, reports = optimize(model)
    check_same(model, after, seed)
    assert [report.left_out for report in reports] == [None] * len(PASSES)
    assert reports[-1].flops[1] <= reports[0].flops[0]
    for one, two in itertools.pairwise(reports):
        assert (one.nodes[1], one.flops[1]) == (two.nodes[0], two.flops[0])
    assert sum(report.rewrites for report in reports) > 0


def test_switched_off_by_name() -> None:
    model = random_graph(np.random.default_rng(1))
    after, reports = optimize(model, without=list(BY_NAME))
    assert after == model
    assert {report.left_out for report in reports} == {"switched off"}
    _, reports = optimize(model, without=["user_rows"])
    assert {report.name for report in reports if report.left_out} == {"user_rows"}
    with pytest.raises(ValueError, match=r"no graph pass 'user_row'; there are: fold, .*user_rows"):
        optimize(model, without=["user_row"])


# ---- user rows


def row_wise(b: GraphBuilder, x: str, keys: str) -> dict[str, str]:
    """Every kind of row-wise operation on users' rows x [N, USER] and keys [N, HISTORY, DIM]."""
    rng = np.random.default_rng(5)

    def weights(*shape: int) -> str:
        return b.constant(rng.standard_normal(shape) / np.sqrt(shape[0]))

    return {
        "add a vector": b("Add", x, weights(USER)),
        "a constant first": b("Sub", weights(1, USER), x),
        "clip": b("Clip", x, b.constant(-0.5), b.constant(0.5)),
        "matmul": b("MatMul", x, weights(USER, 3)),
        "matmul of keys": b("MatMul", keys, weights(DIM, 3)),
        "keys with keys": b("MatMul", keys, b("Transpose", keys, perm=[0, 2, 1])),
        "gemm": b("Gemm", x, weights(3, USER), weights(3), transB=1),
        "gemm, bias of one row": b("Gemm", x, weights(USER, 3), weights(1, 3)),
        "softmax": b("Softmax", x, axis=1),
        "layer norm": b("LayerNormalization", x, weights(USER), weights(USER)),
        "mean over keys": b("ReduceMean", keys, b.constant([1]), keepdims=0),
        "max, kept": b("ReduceMax", keys, b.constant([-1]), keepdims=1),
        "concat": b("Concat", x, b("Relu", x), axis=-1),
        "slice": b("Slice", x, b.constant([2]), b.constant([9]), b.constant([1])),
        "squeeze": b("Squeeze", b("Unsqueeze", x, b.constant([2])), b.constant([-1])),
        "flat keys": b("Reshape", keys, b.constant([-1, HISTORY * DIM])),
        "halves": b("Reshape", x, b.constant([0, 2, -1])),
        "some columns": b("Gather", x, b.constant([3, 1]), axis=1),
        "flatten": b("Flatten", keys),
        "where": b("Where", b("Less", x, b.constant(0.0)), b.constant(0.0), x),
        "power": b("Pow", x, b.constant(2.0)),
        "split": b.many("Split", x, b.constant([USER // 2, USER // 2]), outputs=2, axis=1)[1],
    }


CASES = list(row_wise(GraphBuilder(), "x", "keys"))


@pytest.mark.parametrize("case", CASES)
def test_rows_of_users_are_taken_behind_what_is_row_wise(case: str) -> None:
    b = GraphBuilder()
    wanted = row_wise(b, b.taken("user_pooled"), b.taken("history"))[case]
    model = b.model(b("Identity", wanted))
    after, rewrites = apply("user_rows", model)
    check_same(model, after, seed=3)
    assert rewrites
    *work, last = after.graph.node
    assert last.op_type == "Gather"
    assert last.input[1] == "user_index"
    assert "user_index" not in {name for node in work for name in node.input}  # everything else is of U rows


def mixes_rows(b: GraphBuilder, x: str, keys: str) -> dict[str, str]:
    """Operations that look at several rows, or whose rows are not the first axis: left where they are."""
    candidates = b("ReduceSum", "item_pooled", b.constant([1]), keepdims=1)  # [N, 1]
    return {
        "softmax over rows": b("Softmax", x, axis=0),
        "sum over rows": b("ReduceSum", x, b.constant([0]), keepdims=1),
        "transpose": b("Transpose", x, perm=[1, 0]),
        "rows run together": b("Reshape", x, b.constant([-1, 2])),
        "rows as a later axis": b("Add", x, keys_of_one(b, keys)),
        "candidates meet": b("Mul", x, candidates),
        "a new first axis": b("Unsqueeze", x, b.constant([0])),
        "first rows": b("Slice", x, b.constant([0]), b.constant([1]), b.constant([0])),
    }


def keys_of_one(b: GraphBuilder, keys: str) -> str:
    """[HISTORY, 1, 1], of the first candidate's keys: broadcast against [N, USER] the rows become the second axis."""
    first = b("Slice", keys, b.constant([0]), b.constant([1]), b.constant([0]))
    return b("Reshape", b("ReduceSum", first, b.constant([2]), keepdims=1), b.constant([HISTORY, 1, 1]))


@pytest.mark.parametrize("case", list(mixes_rows(GraphBuilder(), "x", "keys")))
def test_what_mixes_rows_stays_where_it_is(case: str) -> None:
    b = GraphBuilder()
    wanted = mixes_rows(b, b.taken("user_pooled"), b.taken("history"))[case]
    model = b.model(wanted)
    after, _ = apply("user_rows", model)
    check_same(model, after, seed=4)
    assert any(node.op_type == "Gather" and node.input[0] == "user_pooled" for node in after.graph.node)


def test_the_users_half_of_a_product_is_computed_once_per_user() -> None:
    b = GraphBuilder()
    rng = np.random.default_rng(0)
    mean = b.taken(b("ReduceMean", "history", b.constant([1]), keepdims=0))
    x = b("Concat", "item_pooled", b.taken("user_pooled"), mean, axis=1)
    model = b.model(b("Gemm", x, b.constant(rng.standard_normal((ITEM + USER + DIM, 64)))))
    after, _ = apply("user_rows", model)
    check_same(model, after, seed=6)
    whole, item = 2 * 64 * (ITEM + USER + DIM), 2 * 64 * ITEM
    assert count_flops(model, users=1, candidates=500) >= 500 * whole
    assert count_flops(after, users=1, candidates=500) <= 500 * (item + 64) + whole + HISTORY * DIM
    assert count_flops(after, users=8, candidates=500) <= 500 * (item + 64) + 8 * (whole + HISTORY * DIM)


def test_few_columns_of_users_are_not_worth_a_half_of_their_own() -> None:
    b = GraphBuilder()
    few = b("Slice", b.taken("user_pooled"), b.constant([0]), b.constant([4]), b.constant([1]))
    x = b("Concat", "item_pooled", few, axis=1)
    model = b.model(b("Gemm", x, b.constant(np.ones((ITEM + 4, 8)))))
    after, _ = apply("user_rows", model)
    check_same(model, after, seed=7)
    assert ops(after)["Gemm"] == 1


def test_the_sums_of_a_factorisation_machine_are_split() -> None:
    """Σ_f v_f and Σ_f v_f², v [N, F, D]: the users' fields are summed once per user."""
    b = GraphBuilder()
    x = b("Concat", b.taken("user_pooled"), "item_pooled", axis=1)
    v = b("Reshape", x, b.constant([-1, (USER + ITEM) // DIM, DIM]))
    total = b("ReduceSum", v, b.constant([1]), keepdims=0)
    squares = b("ReduceSum", b("Mul", v, v), b.constant([1]), keepdims=0)
    model = b.model(b("Sub", b("Mul", total, total), squares))
    after, _ = apply("user_rows", model)
    check_same(model, after, seed=8)
    assert count_flops(after, users=1, candidates=500) < 0.7 * count_flops(model, users=1, candidates=500)


# ---- target attention


def attention(b: GraphBuilder, *, users_keys: bool = True, width: int = 16, expand: bool = True) -> str:
    """The first layer over [q, k, q - k, q ∘ k], [N, HISTORY, width]."""
    rng = np.random.default_rng(9)
    columns = b("Slice", "item_pooled", b.constant([0]), b.constant([DIM]), b.constant([1]))
    query = b("Unsqueeze", columns, b.constant([1]))
    keys = b.taken("history") if users_keys else b("Add", b.taken("history"), query)
    if expand:
        shape = b("Concat", b("Shape", "user_index"), b.constant([HISTORY, DIM]), axis=0)
        query = b("Expand", query, shape)
    pairs = b("Concat", query, keys, b("Sub", query, keys), b("Mul", query, keys), axis=-1)
    product = b("MatMul", pairs, b.constant(rng.standard_normal((4 * DIM, width)) / 6))
    return b("Relu", b("Add", product, b.constant(rng.standard_normal(width))))


@pytest.mark.parametrize("users_keys", [True, False], ids=["keys of the user", "keys of the candidate"])
def test_only_what_is_of_a_pair_is_computed_per_pair(users_keys: bool) -> None:
    b = GraphBuilder()
    model = b.model(attention(b, users_keys=users_keys))
    after, rewrites = apply("target_attention", model)
    check_same(model, after, seed=10)
    assert rewrites
    split, _ = apply("user_rows", after)
    check_same(model, split, seed=10)
    share = 0.34 if users_keys else 0.6  # of four products per pair, one is left, or two
    assert count_flops(split, users=1, candidates=500) < share * count_flops(model, users=1, candidates=500)
    assert ops(split)["Expand"] == 0


def test_a_difference_whose_sides_are_no_parts_stays_one_product() -> None:
    b = GraphBuilder()
    keys = b.taken("history")
    other = b("Tanh", keys)
    pairs = b("Concat", b("Sub", keys, other), b("Mul", keys, other), axis=-1)
    model = b.model(b("MatMul", pairs, b.constant(np.random.default_rng(2).standard_normal((2 * DIM, 5)))))
    after, rewrites = apply("target_attention", model)
    check_same(model, after, seed=11)
    assert rewrites == 0


def test_layers_over_pairs_become_gemms_with_their_activations(tmp_path: Path) -> None:
    """One Reshape before the first layer, and one behind the last: those between have cancelled out."""
    b = GraphBuilder()
    rng = np.random.default_rng(3)
    second = b("MatMul", attention(b), b.constant(rng.standard_normal((16, 12))))
    model = b.model(b("Relu", b("Add", second, b.constant(rng.standard_normal(12)))))
    after, _ = apply("flat_products", model)
    check_same(model, after, seed=12)
    assert ops(after)["Gemm"] == 2
    assert ops(after)["Reshape"] == 2
    assert kernels(after, tmp_path)["FusedGemm"] == 2


# ---- horizontal fusion


def test_narrow_products_of_one_input_become_one() -> None:
    b = GraphBuilder()
    rng = np.random.default_rng(4)
    gates = [
        b("Softmax", b("Gemm", "item_pooled", b.constant(rng.standard_normal((8, ITEM))), transB=1), axis=1)
        for _ in range(3)
    ]
    towers = [
        b("Gemm", "item_pooled", b.constant(rng.standard_normal((ITEM, 4))), b.constant(rng.standard_normal(4)))
        for _ in range(2)
    ]
    wide = [b("Gemm", "item_pooled", b.constant(rng.standard_normal((ITEM, 64)))) for _ in range(2)]
    model = b.model(*gates, *towers, *wide)
    after, rewrites = apply("horizontal", model)
    check_same(model, after, seed=13)
    assert rewrites == 3
    assert ops(after) == {"Gemm": 4, "Split": 2, "Softmax": 3}  # the wide ones are faster alone


def test_mixtures_of_the_same_experts_become_one_product() -> None:
    b = GraphBuilder()
    experts = b("Concat", *(b("Unsqueeze", b("Tanh", "item_pooled"), b.constant([1])) for _ in range(3)), axis=1)
    rng = np.random.default_rng(5)
    gates = [
        b("Unsqueeze", b("Gemm", "item_pooled", b.constant(rng.standard_normal((ITEM, 3)))), b.constant([1]))
        for _ in range(2)
    ]
    model = b.model(*(b("MatMul", gate, experts) for gate in gates))
    after, _ = apply("horizontal", model)
    check_same(model, after, seed=14)
    assert ops(after)["MatMul"] == 1
    assert ops(after)["Gemm"] == 1


def test_a_mixture_that_needs_another_one_stays_behind_it() -> None:
    b = GraphBuilder()
    axis = b.constant([1])
    experts = b("Concat", *(b("Unsqueeze", b(op, "item_pooled"), axis) for op in ("Tanh", "Sigmoid", "Relu")), axis=1)
    rng = np.random.default_rng(5)

    def mixture(x: str) -> str:
        gate = b("Softmax", b("Gemm", x, b.constant(rng.standard_normal((ITEM, 3)))), axis=1)
        return b("MatMul", b("Unsqueeze", gate, axis), experts)

    first = mixture("item_pooled")
    model = b.model(first, mixture("item_pooled"), mixture(b("Squeeze", first, axis)))
    after, _ = apply("horizontal", model)
    check_same(model, after, seed=20)
    assert ops(after)["MatMul"] == 2


# ---- duplicates and folding


def test_equal_subgraphs_are_computed_once_also_where_only_their_constants_are_equal() -> None:
    b = GraphBuilder()
    weight = np.random.default_rng(6).standard_normal((ITEM, 5))
    towers = [b("Relu", b("MatMul", "item_pooled", b.constant(weight))) for _ in range(3)]
    model = b.model(b("Concat", *towers, axis=1))
    after, rewrites = apply("duplicates", model)
    check_same(model, after, seed=15)
    assert rewrites == 4
    assert ops(after) == {"MatMul": 1, "Relu": 1, "Concat": 1}
    assert len(after.graph.initializer) == 1


def batch_norm(b: GraphBuilder, x: str, width: int) -> str:
    rng = np.random.default_rng(7)
    parts = [rng.uniform(0.5, 2, width), *rng.standard_normal((2, width)), rng.uniform(0.5, 2, width)]
    return b("BatchNormalization", x, *(b.constant(part) for part in parts), epsilon=1e-3)


def test_batch_norm_is_folded_into_the_products_on_both_sides() -> None:
    b = GraphBuilder()
    rng = np.random.default_rng(8)
    normal = batch_norm(b, "item_pooled", ITEM)
    first = b("Gemm", normal, b.constant(rng.standard_normal((ITEM, 6))), b.constant(rng.standard_normal(6)))
    second = b("MatMul", normal, b.constant(rng.standard_normal((ITEM, 6))))
    model = b.model(b("Relu", batch_norm(b, first, 6)), b("Relu", batch_norm(b, second, 6)))
    after, rewrites = apply("fold", model)
    check_same(model, after, seed=16)
    assert rewrites == 4  # the first one goes into two products
    assert ops(after) == {"Gemm": 2, "Relu": 2}


def test_batch_norm_stays_where_its_input_is_read_by_others() -> None:
    b = GraphBuilder()
    product = b("MatMul", "item_pooled", b.constant(np.random.default_rng(9).standard_normal((ITEM, 6))))
    model = b.model(batch_norm(b, product, 6), b("Relu", product))
    after, _ = apply("fold", model)
    check_same(model, after, seed=17)
    assert ops(after)["BatchNormalization"] == 1


def test_constants_and_dead_code_are_gone() -> None:
    b = GraphBuilder()
    b("Relu", "history")
    scale = b("Exp", b("Add", b.constant(0.5), b.constant(0.25)))
    model = b.model(b("Identity", b("Mul", "item_pooled", scale)))
    after, _ = apply("fold", model)
    check_same(model, after, seed=18)
    assert ops(after) == {"Mul": 1}


# ---- order


def test_a_products_first_operand_is_computed_just_before_it() -> None:
    b = GraphBuilder()
    rng = np.random.default_rng(11)
    pairs = b("Tanh", "item_pooled")
    addend = b("Relu", b("MatMul", "item_pooled", b.constant(rng.standard_normal((ITEM, 5)))))
    first = b("Gemm", pairs, b.constant(rng.standard_normal((ITEM, 5))), addend)
    model = b.model(b("Sigmoid", first), b("Exp", addend))
    after, rewrites = apply("order", model)
    check_same(model, after, seed=21)
    assert rewrites
    assert [node.op_type for node in after.graph.node] == ["MatMul", "Relu", "Tanh", "Gemm", "Sigmoid", "Exp"]
    assert apply("order", after)[1] == 0


def test_a_deep_graph_is_ordered_too() -> None:
    b = GraphBuilder()
    x = "item_pooled"
    for _ in range(3000):
        x = b("Abs", x)
    model = b.model(x)
    after, rewrites = apply("order", model)
    assert (ops(after)["Abs"], rewrites) == (3000, 0)


# ---- what ONNX Runtime fuses itself


def kernels(model: onnx.ModelProto, folder: Path) -> Counter[str]:
    """The ops that ONNX Runtime runs in the end."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return ops(onnx.load(folder / "optimised.onnx"))


def layer_norm_by_hand(b: GraphBuilder, x: str, width: int) -> str:
    centred = b("Sub", x, b("ReduceMean", x, b.constant([-1])))
    variance = b("ReduceMean", b("Pow", centred, b.constant(2.0)), b.constant([-1]))
    normal = b("Div", centred, b("Sqrt", b("Add", variance, b.constant(1e-5))))
    return b("Add", b("Mul", normal, b.constant(np.full(width, 1.5))), b.constant(np.full(width, 0.5)))


def gelu_by_hand(b: GraphBuilder, x: str) -> str:
    cdf = b("Add", b("Erf", b("Div", x, b.constant(float(np.sqrt(2))))), b.constant(1.0))
    return b("Mul", b("Mul", x, cdf), b.constant(0.5))


def test_patterns_that_onnx_runtime_fuses_are_still_there(tmp_path: Path) -> None:
    """On candidates, on users, and over both side by side."""
    b = GraphBuilder()
    rng = np.random.default_rng(10)
    outputs = []
    both = b("Concat", b.taken("user_pooled"), "item_pooled", axis=1)
    for x, width in ((b.taken("user_pooled"), USER), ("item_pooled", ITEM), (both, USER + ITEM)):
        hidden = gelu_by_hand(b, layer_norm_by_hand(b, x, width))
        pre = b("Gemm", hidden, b.constant(rng.standard_normal((width, 40)) / 6), b.constant(rng.standard_normal(40)))
        outputs.append(b("Relu", pre))
    model = b.model(*outputs)
    after, reports = optimize(model)
    check_same(model, after, seed=19)
    assert reports[[*BY_NAME].index("user_rows")].rewrites
    before, now = kernels(model, tmp_path), kernels(after, tmp_path)
    assert before["LayerNormalization"] == 3
    assert before["FusedGemm"] == 3
    for fused in ("LayerNormalization", "Gelu", "FusedGemm", "BiasGelu"):
        assert now[fused] >= before[fused], fused
