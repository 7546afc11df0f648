"""Pooling between a float layer and a quantised one stays in float."""

from __future__ import annotations

import onnx


def relu_behind(model: onnx.ModelProto) -> None:
    """Put a Relu that stands between a float layer and a quantised max pooling behind the pooling.

    The values are the same: the largest of numbers cut off at zero is the largest of them, cut off
    at zero. But ONNX Runtime moves a quantisation in front of the pooling that it follows, and then
    pools integers with channels first, which takes half the time of a SqueezeNet. It moves none in
    front of a Relu, and drops the Relu itself, as the quantisation cuts off at zero, too.
    """
    nodes = model.graph.node
    made_by = {name: index for index, node in enumerate(nodes) for name in node.output}
    outputs = {one.name for one in model.graph.output}
    users: dict[str, list[int]] = {}
    for index, node in enumerate(nodes):
        for name in node.input:
            users.setdefault(name, []).append(index)
    for later, node in enumerate(nodes):
        earlier = made_by.get(node.input[0], -1) if node.op_type == "MaxPool" else -1
        if earlier < 0 or nodes[earlier].op_type != "Relu" or len(node.output) != 1:
            continue
        cut, pooled = node.input[0], node.output[0]
        behind = {nodes[index].op_type for index in users.get(pooled, ())}
        if cut in outputs or users[cut] != [later] or behind != {"QuantizeLinear"}:
            continue
        relu, pool = onnx.NodeProto(), onnx.NodeProto()
        relu.CopyFrom(nodes[earlier])
        pool.CopyFrom(node)
        pool.input[0], pool.output[0] = relu.input[0], cut
        relu.input[0], relu.output[0] = cut, pooled
        nodes[earlier].CopyFrom(pool)
        nodes[later].CopyFrom(relu)
        shapes = model.graph.value_info
        for stale in [one for one in shapes if one.name == cut]:
            shapes.remove(stale)
