"""Faster precisions: kept if accurate and faster, else refused with figures."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from export import benchmark, parity
from export.precision import int8, select
from export.precision.verdict import compare_with_fp32
from serving.bundle import storage
from serving.errors import BundleError, GateError, OptionError, WorkError
from serving.imaging.preprocess import Preprocess
from serving.inference import runtime
from serving.inference.load import open_predictor, verify
from tests.export.conftest import contents, export, rates

# ---- the verdict


def verdict_of(lost, won, photos=200, **options):
    labels = [0] * photos
    fp32 = [1] * won + [0] * (photos - won)
    other = [0] * (photos - lost) + [1] * lost
    return compare_with_fp32(fp32, other, labels, **{"speedup": 2.0, "budget": 0.5} | options)


def test_a_faster_precision_of_equal_accuracy_is_kept():
    verdict = verdict_of(lost=3, won=3, photos=2000)
    assert verdict.refusal_reason is None
    assert (verdict.drop, verdict.accuracy, verdict.accuracy_fp32) == (0, 0.9985, 0.9985)
    low, high = verdict.interval
    assert low < 0 < high
    assert low == pytest.approx(-high)
    assert "kept; on 2000 held-out photos 99.85%, fp32 99.85%" in verdict.summary("int8")


@pytest.mark.parametrize(
    ("lost", "won", "options", "why"),
    [
        (15, 3, {}, "falls by 6.00 points, and the budget is 0.5"),
        (5, 3, {"budget": 5.0}, None),
        (1, 0, {}, "may fall by up to 2.98 points (95 % confidence), and the budget is 0.5"),
        (0, 0, {"photos": 894}, None),
        (0, 0, {"photos": 893}, "may fall by up to 0.50 points (95 % confidence), and the budget"),
        (0, 0, {"photos": 2000, "speedup": 0.97}, "no faster here: 0.97 times fp32"),
    ],
)
def test_a_precision_is_refused_by_accuracy_and_speed(lost, won, options, why):
    refusal_reason = verdict_of(lost, won, **options).refusal_reason
    assert refusal_reason is None if why is None else why in refusal_reason


def test_a_precision_with_logits_that_are_not_finite_is_refused(
    shared_run, tmp_path, monkeypatch, recorded_exporters
):
    monkeypatch.setattr(benchmark, "measure", rates)
    real, lines = select.predict_views, []

    def overflowing(*args, **options):
        held_out = real(*args, **options)
        if options.get("views") == 1 and len(held_out.logits):
            held_out.logits[0] = np.nan
        return held_out

    monkeypatch.setattr(select, "predict_views", overflowing)
    options = {"precision": "auto", "accuracy_budget": 90}
    manifest = export(shared_run, tmp_path / "bundle", log=lines.append, **options)
    assert "the logits of 1 photos are not finite" in manifest.tried["int8"]["why_not"]
    assert set(manifest.precisions) == {"fp32"}
    assert "model.int8.onnx" not in manifest.files


def test_a_precision_that_can_not_be_tried_leaves_no_file(
    shared_run, tmp_path, monkeypatch, recorded_exporters
):
    def out_of_memory(graphs, *args):
        if len(graphs) > 1:
            raise WorkError("out of memory")
        return rates(graphs, *args)

    monkeypatch.setattr(benchmark, "measure", out_of_memory)
    options = {"precision": "auto", "accuracy_budget": 90}
    manifest = export(shared_run, tmp_path / "bundle", **options)
    assert manifest.tried["int8"]["why_not"] == "not tried: out of memory"
    assert "model.int8.onnx" not in manifest.files


def test_a_gpu_on_which_no_graph_loads_is_not_used(
    shared_run, tmp_path, monkeypatch, recorded_exporters
):
    monkeypatch.setattr(benchmark, "measure", rates)
    monkeypatch.setattr(runtime, "_why_not", lambda device: None)
    select._usable.cache_clear()
    try:
        manifest = export(shared_run, tmp_path / "bundle", precision="fp32")
        assert set(manifest.tuning) == {"cpu"}
        with pytest.raises(OptionError, match="no usable GPU"):
            export(shared_run, tmp_path / "b", precision="fp16")
    finally:
        select._usable.cache_clear()


@pytest.mark.parametrize("photos", [50, 500])
def test_the_interval_covers_the_true_drop(photos):
    """It must do so in at least 93 % of 600 samples whose true drop is one point."""
    rng, covered, times = np.random.default_rng(0), 0, 600
    for _ in range(times):
        kinds = rng.choice(3, p=[0.03, 0.02, 0.95], size=photos)  # lost, won, neither
        low, high = verdict_of((kinds == 0).sum(), (kinds == 1).sum(), photos).interval
        covered += low <= 1 <= high
    assert covered / times >= 0.93


# ---- the search


@pytest.fixture(scope="module")
def pixels(shared_run):
    """Those that the export draws."""
    samples = [(sample.path, sample.label) for sample in shared_run.dataset.train]
    return int8.draw(samples, shared_run.preprocess)


@pytest.fixture
def source(exported_with_int8):
    """The graph in float32."""
    return exported_with_int8.out / exported_with_int8.manifest.version / "model.onnx"


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """A graph with 16 layers."""
    rng, count = np.random.default_rng(0), 16
    nodes = [
        helper.make_node("Cast", ["pixels"], ["cast"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["cast"], ["x0"], axes=[1, 2], keepdims=0),
    ]
    for n in range(count):
        output = "logits" if n == count - 1 else f"x{n + 1}"
        nodes.append(helper.make_node("MatMul", [f"x{n}", f"w{n}"], [output], f"layer{n}"))
    weights = [rng.normal(size=(3 if n == 0 else 8, 8)).astype(np.float32) for n in range(count)]
    graph = helper.make_graph(
        nodes,
        "deep",
        [helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["batch", 32, 32, 3])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 8])],
        [numpy_helper.from_array(one / 3, f"w{n}") for n, one in enumerate(weights)],
    )
    path = tmp_path_factory.mktemp("deep") / "model.onnx"
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), path)
    return path


def test_photos_are_drawn_class_by_class_and_the_same_on_every_call(shared_run):
    samples = [(sample.path, sample.label) for sample in shared_run.dataset.train]
    assert len(samples) == 21
    first, again = (int8.draw(samples, shared_run.preprocess, n) for n in (1, 3))
    assert np.array_equal(first, again)
    assert first.shape == (21, 32, 32, 3)
    with pytest.raises(WorkError, match="12 training photos can be read, and 20 are needed"):
        int8.draw(samples[:12], shared_run.preprocess)


def test_a_configuration_near_fp32_is_found(source, pixels, recorded_exporters):
    result = int8.search(source, pixels, 1 - 90 / 100)  # as in the export of `exported_with_int8`
    assert len(result.tried) == len({config[:3] for config in result.tried}) == 12
    limit = 1.5 * min(config.divergence for config in result.tried)
    assert 0 < result.config.divergence <= min(limit, 1)
    near = [config for config in result.tried if config.divergence <= limit]
    assert len(result.config.float_layers) == min(len(config.float_layers) for config in near)
    operators = [node.op_type for node in result.model.graph.node]
    assert operators.count("DequantizeLinear") > 10
    onnx.checker.check_model(result.model, full_check=True)


def test_of_similar_configurations_the_one_with_fewest_float_layers_is_chosen():
    far = int8.QuantConfig("minmax", False, (), 0.031, 1.0)
    wholly = int8.QuantConfig("minmax", True, (), 0.029, 1.0)
    ends = int8.QuantConfig("minmax", True, ("first", "last"), 0.020, 1.0)
    last = int8.QuantConfig("percentile", True, ("last",), 0.022, 1.0)
    assert int8._choose([far, ends, last]) is last
    assert int8._choose([far, wholly, ends, last]) is wholly
    assert int8._choose([far, ends]) is ends


def test_a_configuration_with_too_little_agreement_is_not_chosen_if_another_has_enough(
    deep, pixels, monkeypatch
):
    """The divergence of that configuration is smaller."""

    def only_percentiles(self, config, model, photos=None):
        agrees = config.method == "percentile"
        return config._replace(agreement=float(agrees), divergence=0.05 if agrees else 0.01)

    monkeypatch.setattr(int8._Comparison, "__call__", only_percentiles)
    monkeypatch.setattr(int8, "_quantised", lambda graph, ranges, config: graph)
    result = int8.search(deep, pixels, min_agreement=1.0)
    assert len(result.tried) == 12  # no layer was ranked
    assert result.config[:3] == ("percentile", False, ())
    # If none has enough, the least divergence decides, with any number of float layers.
    monkeypatch.setattr(
        int8._Comparison,
        "__call__",
        lambda self, config, model, photos=None: config._replace(
            divergence=1 / (50 + len(config.float_layers))
        ),
    )
    result = int8.search(deep, pixels, min_agreement=1.0)
    most = max(len(config.float_layers) for config in result.tried)
    assert len(result.config.float_layers) == most > 2


@pytest.mark.parametrize("per_channel", [False, True])
def test_products_of_two_weights_never_saturate(source, pixels, per_channel):
    """CPUs without VNNI add two products of a weight and an activation up to 255 in 16 bits."""
    ranges = int8.ranges(source, pixels[:8], "minmax")
    config = int8.QuantConfig("minmax", per_channel, ())
    graph = int8._quantised(onnx.load(source), ranges, config).graph
    stored = {one.name: onnx.numpy_helper.to_array(one) for one in graph.initializer}
    weights = [stored[one] for one in stored if one.endswith("weight_quantized")]
    assert len(weights) == 9  # 7 convolutions and 2 linear layers
    largest = {int(np.abs(one.astype(int)).max()) for one in weights}
    assert len(largest) == 1
    assert 2 * 255 * largest.pop() in range(32_000, np.iinfo(np.int16).max + 1)


def test_layers_are_left_in_float_until_enough_photos_agree(deep, pixels, monkeypatch):
    monkeypatch.setattr(int8, "_METHODS", {"minmax": int8._METHODS["minmax"]})
    real = int8._Comparison.__call__

    def agreement_by_layers(self, config, model, photos=None):
        agreement = 0.1 * len(config.float_layers)
        return real(self, config, model, photos)._replace(agreement=agreement)

    monkeypatch.setattr(int8._Comparison, "__call__", agreement_by_layers)
    result = int8.search(deep, pixels, min_agreement=0.35)
    assert result.config.agreement >= 0.35
    assert len(result.config.float_layers) >= 4
    assert all(config.agreement < 0.35 for config in result.tried[:-1])
    names = {node.name for node in result.model.graph.node}
    left = [name for name in result.config.float_layers if name in names]
    inputs = {node.name: node.input for node in result.model.graph.node}
    made_by = {name: node.op_type for node in result.model.graph.node for name in node.output}
    assert len(left) == len(result.config.float_layers)
    for name in left:
        assert made_by.get(inputs[name][1]) != "DequantizeLinear"  # its weight is float


def test_the_mean_before_a_quantised_layer_has_a_value_per_column_and_channel(
    exported_with_int8, source, pixels, tmp_path
):
    ranges = int8.ranges(source, pixels[:8], "minmax")
    config = int8.QuantConfig("minmax", False, ())
    quantised = int8._quantised(onnx.load(source), ranges, config)
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    session = ort.InferenceSession(
        quantised.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    graph = onnx.load(options.optimized_model_filepath).graph
    (subtraction,) = [node for node in graph.node if node.op_type == "Sub"]
    stored = {one.name: tuple(one.dims) for one in graph.initializer}
    (mean,) = [stored[name] for name in subtraction.input if name in stored]
    # Channels last, as ONNX Runtime computes everything before a quantised convolution.
    assert mean[-2:] == (exported_with_int8.manifest.preprocess.size, 3)
    assert session.get_inputs()[0].name == "pixels"


# ---- the bundle


def test_a_kept_precision_is_in_the_bundle_and_passes_its_golden_images(exported_with_int8):
    out, manifest, lines = exported_with_int8
    assert set(manifest.precisions) == {"fp32", "int8"}
    assert manifest.tried["int8"]["kept"]
    assert manifest.tried["fp16"]["why_not"] == "not tried: no GPU here"
    assert manifest.tried["int8"]["times_fp32"] == pytest.approx(208 / 108, rel=0.01)
    assert "model.int8.onnx" in manifest.files
    assert any(line.startswith("int8 kept; on 21 held-out photos") for line in lines)
    fp32 = (out / manifest.version / "model.onnx").stat().st_size
    assert (out / manifest.version / "model.int8.onnx").stat().st_size < 0.7 * fp32
    predictor = open_predictor(out, device="cpu")
    assert predictor.precision == "int8"
    lines = verify(out)
    assert [line.partition(" ")[0] for line in lines[2:]] == ["fp32", "int8"]
    graph = onnx.load(out / manifest.version / "model.int8.onnx")
    facts = {item.key: item.value for item in graph.metadata_props}
    assert facts["name"] == manifest.name
    assert json.loads(facts["labels"]) == list(manifest.labels)


def test_exporting_a_run_twice_gives_the_same_int8_bundle(
    exported_with_int8, shared_run, tmp_path, monkeypatch, recorded, recorded_exporters
):
    out, manifest, _ = exported_with_int8
    monkeypatch.setattr(int8, "search", recorded.search)  # once more
    monkeypatch.setattr(benchmark, "measure", rates)
    options = {"precision": "auto", "accuracy_budget": 90}
    assert export(shared_run, tmp_path / "other", **options) == manifest
    assert contents(tmp_path / "other") == contents(out)


def test_a_bundle_with_a_changed_byte_in_the_int8_graph_is_refused(exported_with_int8, tmp_path):
    out = shutil.copytree(exported_with_int8.out, tmp_path / "bundle")
    path = out / exported_with_int8.manifest.version / "model.int8.onnx"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(BundleError, match=r"model\.int8\.onnx was changed"):
        open_predictor(out, device="cpu", precision="fp32")


@pytest.mark.parametrize("requested", ["auto", "int8"])
def test_a_precision_that_costs_too_much_accuracy_is_refused(
    shared_run, tmp_path, monkeypatch, recorded_exporters, requested
):
    out, lines = tmp_path / "bundle", []
    options = {"precision": requested, "accuracy_budget": 60}
    monkeypatch.setattr(benchmark, "measure", rates)

    def worse(fp32, other, labels, **options):
        return compare_with_fp32(labels, [-1] * len(labels), labels, **options)

    monkeypatch.setattr(select, "compare_with_fp32", worse)
    if requested == "int8":
        with pytest.raises(GateError, match=r"--precision int8 is refused: accuracy falls by 100"):
            export(shared_run, out, log=lines.append, **options)
        assert not out.exists()
        return
    manifest = export(shared_run, out, log=lines.append, **options)
    assert set(manifest.precisions) == {"fp32"}
    assert not (out / manifest.version / "model.int8.onnx").exists()
    assert "accuracy falls by 100.00 points" in manifest.tried["int8"]["why_not"]
    assert set(manifest.tuning["cpu"]["throughput"]) == {"fp32"}
    assert any(line.startswith("int8 refused: accuracy falls") for line in lines)
    assert storage.read(out).manifest == manifest


def test_with_too_few_photos_only_fp32_is_kept(run, tmp_path, monkeypatch, recorded_exporters):
    monkeypatch.setattr(benchmark, "measure", rates)
    for sample in run.dataset.train[12:]:
        sample.path.write_bytes(b"no photo")
    options = {"precision": "auto", "accuracy_budget": 90}
    manifest = export(run, tmp_path / "bundle", **options)
    assert "12 training photos can be read" in manifest.tried["int8"]["why_not"]
    with pytest.raises(WorkError, match="20 are needed"):
        export(run, tmp_path / "b", precision="int8")


def test_with_few_photos_int8_is_not_tried_and_a_line_says_what_helps(
    shared_run, tmp_path, monkeypatch, recorded_exporters
):
    """21 held-out photos say nothing about half a point; the search would take minutes."""
    monkeypatch.setattr(benchmark, "measure", rates)
    monkeypatch.setattr(int8, "search", None)
    lines = []
    manifest = export(shared_run, tmp_path / "bundle", precision="auto", log=lines.append)
    assert set(manifest.precisions) == {"fp32"}
    entry = manifest.tried["int8"]
    assert (entry["kept"], entry["sure"]) == (False, False)
    reason = (
        "too few photos to judge accuracy: 21 photos can show at best that it falls by no more "
        "than 18.78 points, and 894 or more are needed for 0.5; add held-out photos with --photos "
        "DIR or --folds RUN, or use --precision int8 to keep it "
        "nevertheless"
    )
    assert entry["why_not"] == f"not tried: {reason}"
    assert f"int8 not tried, fp32 is served: {reason}" in lines


def test_int8_by_name_is_kept_on_few_photos_and_says_that_they_can_not_tell(
    shared_run, tmp_path, monkeypatch, recorded_exporters
):
    monkeypatch.setattr(benchmark, "measure", rates)

    def equal(fp32, other, labels, **options):
        return compare_with_fp32(fp32, fp32, labels, **options)

    monkeypatch.setattr(select, "compare_with_fp32", equal)
    monkeypatch.setattr(select, "evidence", lambda *_, **__: None)
    lines = []
    manifest = export(shared_run, tmp_path / "bundle", precision="int8", log=lines.append)
    entry = manifest.tried["int8"]
    assert (entry["kept"], entry["sure"], entry["fell_points"]) == (True, False, 0)
    assert entry["fell_at_most"] == pytest.approx(18.779, abs=0.01)
    assert any(
        line.startswith("int8 kept, as --precision int8 asks, though accuracy may fall by up to 18")
        for line in lines
    )


def test_training_photos_are_compared_where_held_out_ones_are_too_few():
    train = [(Path(f"{n}.jpg"), n % 3) for n in range(1000)]
    request = select.PrecisionRequest("auto", 0.5, train)
    unused = request.training(240)
    assert len(unused) == 700
    drawn = set(int8.order(train)[: int8.DRAWN])
    assert not drawn & {path for path, _ in unused}
    assert all(label == int(path.stem) % 3 for path, label in unused)
    assert len(request.training(894)) == 700  # used if the held-out photos leave a doubt
    assert len(request.training(1900)) == 100  # 2,000 in all
    assert request.training(19) == []  # too few held-out photos to weight them
    assert request.more_held_out(240) == []
    held_out = [(Path(f"h{n}.jpg"), 0) for n in range(3000)]
    untrained = replace(request, trained=False, held_out=held_out[:100])
    assert untrained.more_held_out(240) == [*held_out[:100], *unused]
    assert untrained.training(240) == []
    assert len(replace(request, held_out=held_out).more_held_out(500)) == 1500
    assert select._too_few("int8", 240, request) == ""
    assert "893 photos can show" in select._too_few("int8", 193, request)
    assert select._too_few("int8", 193, replace(request, precision="int8")) == ""


# ---- the speed


def test_speed_is_measured_in_every_setting(exported_with_int8, monkeypatch):
    out, manifest, _ = exported_with_int8
    monkeypatch.setattr(benchmark, "SECONDS", 0.002)
    monkeypatch.setattr(benchmark, "ROUNDS", 1)
    monkeypatch.setattr(benchmark, "cores", lambda: 2)
    payload = out / manifest.version
    graphs = {"fp32": payload / "model.onnx", "int8": payload / "model.int8.onnx"}
    photos = [(payload / item["file"]).read_bytes() for item in manifest.golden]
    rates = benchmark.measure(graphs, manifest.preprocess, photos)
    assert set(rates) == {"fp32", "int8"}
    for by_setting in rates.values():
        splits = {(setting.workers, setting.threads) for setting in by_setting}
        assert splits == {(2, 1), (1, 2), (1, 1)}
        assert {setting.batch for setting in by_setting if not setting.decoding} == set(
            benchmark.BATCHES
        )
        decoding = {
            benchmark.ThreadSetting(2, 1, batch, decoding=True)
            for batch in benchmark.DECODING_BATCHES
        }
        assert {setting for setting in by_setting if setting.decoding} == decoding
        assert all(rate > 0 for rate in by_setting.values())
    advice = benchmark.advice(rates)
    assert advice["cores"] == 2
    assert set(advice["throughput"]) == set(advice["latency"]) == {"fp32", "int8"}
    assert len(advice["measured"]) == 2 * (11 + 4)


def test_each_graph_is_measured_at_its_own_size(monkeypatch):
    monkeypatch.setattr(benchmark, "SECONDS", 0)
    monkeypatch.setattr(benchmark, "ROUNDS", 1)
    shapes = {}

    class Recorder:
        def __init__(self, path, **options):
            self.path = path

        def run(self, pixels):
            shapes.setdefault(self.path, set()).add(pixels.shape[1:])
            assert pixels.flags.c_contiguous  # a copy would count as time of the graph

    monkeypatch.setattr(benchmark, "OnnxRuntime", Recorder)
    graphs = {"small": Path("s"), "large": Path("l")}
    rates = benchmark.measure(graphs, Preprocess(), sizes={"small": 16, "large": 24})
    assert set(rates) == {"small", "large"}
    assert shapes == {Path("s"): {(16, 16, 3)}, Path("l"): {(24, 24, 3)}}


@pytest.mark.parametrize(
    ("batched", "max_batch"), [(105.0, 1), (150.0, 8)], ids=["hardly faster", "faster"]
)
def test_the_batch_size_is_one_unless_batches_are_clearly_faster(batched, max_batch):
    rates = {benchmark.ThreadSetting(1, 1, 1): 100.0, benchmark.ThreadSetting(1, 1, 8): batched}
    assert benchmark.advice({"fp32": rates})["max_batch"] == max_batch
    assert benchmark.advice({"fp32": rates})["latency"]["fp32"] == {"threads": 1, "ms": 10.0}


def test_rates_with_decoding_decide_max_batch_and_nothing_else():
    without_decoding = {benchmark.ThreadSetting(2, 1, batch): 200.0 for batch in (1, 4)} | {
        benchmark.ThreadSetting(1, 1, 1): 99
    }
    for with_decoding, max_batch in (
        ([100, 118, 122, 121], 4),
        ([100, 121, 122, 121], 2),
        ([100, 105, 104, 99], 1),
    ):
        settings = [
            benchmark.ThreadSetting(2, 1, batch, decoding=True)
            for batch in benchmark.DECODING_BATCHES
        ]
        advice = benchmark.advice(
            {"fp32": without_decoding | dict(zip(settings, with_decoding, strict=True))}
        )
        assert advice["max_batch"] == max_batch
        assert advice["throughput"]["fp32"]["images_per_second"] == 200


def test_all_tolerances_are_within_the_limit_of_a_service():
    from serving.inference.load import MAX_TOLERANCE

    tolerances = [kind.tolerance for kind in select.KINDS.values()]
    assert parity.TOLERANCE < min(tolerances) <= max(tolerances) <= MAX_TOLERANCE
