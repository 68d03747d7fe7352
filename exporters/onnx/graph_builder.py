"""A recorder of ONNX nodes in which every node has a name and every constant exists once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir import tape

from pipeline.errors import VerificationError

OPERATORS_OF_RUNTIME = "com.microsoft"
"""Domain of the operators that only ONNX Runtime has."""


class GraphBuilder:
    """Collects nodes and initializers in the order in which they are asked for."""

    def __init__(self) -> None:
        self._tape = tape.Tape()
        self._constants: dict[str, ir.Value] = {}
        self._inputs: list[ir.Value] = []
        self._outputs: list[ir.Value] = []

    def input(self, name: str, dtype: ir.DataType, shape: list[str | int]) -> ir.Value:
        """A graph input; names in `shape` are sizes that vary."""
        value = _value(name, dtype, shape)
        self._inputs.append(value)
        return value

    def output(
        self, value: ir.Value, name: str, dtype: ir.DataType, shape: list[str | int]
    ) -> None:
        """Make a value a graph output."""
        value.name, value.type, value.shape = name, ir.TensorType(dtype), ir.Shape(shape)
        self._outputs.append(value)

    def op(self, kind: str, *inputs: ir.Value | None, name: str, **attributes: Any) -> ir.Value:
        """The one output of a node of the standard domain, which is called as the node is."""
        output = ir.Value(name=f"{name}.{kind}")
        return self._tape.op(kind, inputs, attributes, name=output.name, output=output)

    def op_multi(
        self,
        kind: str,
        *inputs: ir.Value | None,
        name: str,
        outputs: int,
        domain: str = "",
        **attributes: Any,
    ) -> list[ir.Value]:
        """The outputs of a node that has several."""
        values = [ir.Value(name=f"{name}.{kind}.{n}") for n in range(outputs)]
        name = f"{name}.{kind}"
        self._tape.op_multi_out(kind, inputs, attributes, outputs=values, domain=domain, name=name)
        return values

    def constant(self, values: Any, dtype: type[np.generic]) -> ir.Value:
        """A small constant."""
        array = np.array(values, dtype=dtype)
        return self.table(f"constant.{array.dtype}.{values}".replace(" ", ""), array)

    def table(self, name: str, array: np.ndarray) -> ir.Value:
        """A constant under a name of its own."""
        if name not in self._constants:
            self._constants[name] = self._tape.initializer(ir.Tensor(array, name=name))
        return self._constants[name]

    def initializer(
        self,
        name: str,
        dtype: ir.DataType,
        shape: tuple[int, ...],
        read: Callable[[], np.ndarray],
    ) -> ir.Value:
        """A weight, which is read only when the file is written.

        Saving the model raises VerificationError if the data then have another shape.
        """

        def load() -> ir.Tensor:
            array = np.ascontiguousarray(read())
            if array.shape != shape:
                raise VerificationError(f"{name} is {array.shape}, its entry announces {shape}")
            return ir.Tensor(array, dtype=dtype, name=name)

        return self._tape.initializer(ir.LazyTensor(load, dtype, ir.Shape(shape), name=name))

    def model(self, name: str, opset: int, ir_version: int, runtime_operators: bool) -> ir.Model:
        """Everything so far as a model."""
        imports = {"": opset} | ({OPERATORS_OF_RUNTIME: 1} if runtime_operators else {})
        graph = ir.Graph(
            self._inputs,
            self._outputs,
            nodes=self._tape.nodes,
            initializers=self._tape.initializers,
            opset_imports=imports,
            name=name,
        )
        return ir.Model(graph, ir_version=ir_version, producer_name="piso-deploy")


def _value(name: str, dtype: ir.DataType, shape: list[str | int]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
