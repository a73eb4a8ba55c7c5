"""Metrics over features of pictures, one file a family."""

from nar_t2i.evaluation.metrics.clip_score import ClipScore as ClipScore
from nar_t2i.evaluation.metrics.frechet import Fid as Fid
from nar_t2i.evaluation.metrics.frechet import SceneFrechet as SceneFrechet
from nar_t2i.evaluation.metrics.kernel import Cmmd as Cmmd
from nar_t2i.evaluation.metrics.kernel import Kid as Kid
from nar_t2i.evaluation.metrics.metric import Compared as Compared
from nar_t2i.evaluation.metrics.metric import Metric as Metric
from nar_t2i.evaluation.metrics.precision_recall import PrecisionRecall as PrecisionRecall

METRICS: dict[str, type[Metric]] = {m.name: m for m in (Fid, Kid, PrecisionRecall, ClipScore, Cmmd, SceneFrechet)}
