"""Measures speed, memory and crossover lengths of operations, mechanisms and models against peers."""

from coterie.bench.model import ModelCase, bench_model
from coterie.bench.op import bench_op
from coterie.bench.registry import BenchOp, Case, Contender, Option, get_op, list_ops, register_op
from coterie.bench.scaling import bench_scaling
from coterie.bench.timing import Settings

__all__ = [
    "BenchOp",
    "Case",
    "Contender",
    "ModelCase",
    "Option",
    "Settings",
    "bench_model",
    "bench_op",
    "bench_scaling",
    "get_op",
    "list_ops",
    "register_op",
]
