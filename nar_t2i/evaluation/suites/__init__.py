"""Suites of prompts whose pictures other programs judge, one file a suite."""

from nar_t2i.evaluation.suites.dpg import DpgBench
from nar_t2i.evaluation.suites.geneval import GenEval
from nar_t2i.evaluation.suites.hpsv2 import Hpsv2
from nar_t2i.evaluation.suites.suite import Suite
from nar_t2i.evaluation.suites.t2i_compbench import T2ICompBench

SUITES: dict[str, Suite] = {suite.name: suite for suite in (GenEval(), DpgBench(), T2ICompBench(), Hpsv2())}

__all__ = ["SUITES", "DpgBench", "GenEval", "Hpsv2", "Suite", "T2ICompBench"]
