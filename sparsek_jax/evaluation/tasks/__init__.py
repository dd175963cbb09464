"""Tasks with right answers, for any run or imported model; each is listed in `TASKS`."""

import difflib
from collections.abc import Sequence

from sparsek_jax.evaluation.tasks.common_words import CommonWords
from sparsek_jax.evaluation.tasks.frequent_words import FrequentWords
from sparsek_jax.evaluation.tasks.induction import Induction
from sparsek_jax.evaluation.tasks.key_value import KeyValue
from sparsek_jax.evaluation.tasks.mqar import Mqar
from sparsek_jax.evaluation.tasks.niah import NIAH_MULTIKEY_2, NIAH_MULTIKEY_3, NIAH_SINGLE_1
from sparsek_jax.evaluation.tasks.passkey import Passkey
from sparsek_jax.evaluation.tasks.task import Task
from sparsek_jax.evaluation.tasks.variable_tracking import VariableTracking

_ALL = (
    Passkey(),
    KeyValue(),
    NIAH_SINGLE_1,
    NIAH_MULTIKEY_2,
    NIAH_MULTIKEY_3,
    VariableTracking(),
    CommonWords(),
    FrequentWords(),
    Induction(),
    Mqar(),
)
TASKS: dict[str, Task] = {task.name: task for task in _ALL}


def find_tasks(names: Sequence[str]) -> tuple[Task, ...]:
    """Returns the tasks of these names, each once.

    Raises:
      ValueError: There are no names, or one is of no task.
    """
    if not names:
        raise ValueError(f"tasks={list(names)!r}; expected some of {', '.join(TASKS)}")
    for name in names:
        if name not in TASKS:
            nearest = difflib.get_close_matches(name, TASKS, n=1)
            hint = f"; did you mean {nearest[0]}?" if nearest else ""
            raise ValueError(f"tasks has {name!r}; expected some of {', '.join(TASKS)}{hint}")
    return tuple(TASKS[name] for name in dict.fromkeys(names))
