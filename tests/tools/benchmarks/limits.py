"""Limits of a machine, where none are measured."""

from tools.benchmarks import machine

LIMITS = machine.Limits(flops=2e9, flops_fp32=8e9, copied=4e9)
