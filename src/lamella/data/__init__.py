"""Tasks and models by name: demo assets from PyPI, public tasks, local files; encoded for any kind of model."""

from lamella.data.collating import Collator
from lamella.data.encoding import Encoded, encode
from lamella.data.load import KNOWN_TASKS, load_task
from lamella.data.models import KNOWN_BACKBONES, Backbone, load_backbone
from lamella.data.task import Task, TaskKind

__all__ = [
    "KNOWN_BACKBONES",
    "KNOWN_TASKS",
    "Backbone",
    "Collator",
    "Encoded",
    "Task",
    "TaskKind",
    "encode",
    "load_backbone",
    "load_task",
]
