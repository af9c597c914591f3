"""Tasks and models by name: demo assets from PyPI, public tasks, local files; encoded for any kind of model."""

from lamella.lab.data.encoding import Encoded, encode
from lamella.lab.data.load import KNOWN_TASKS, load_task
from lamella.lab.data.models import KNOWN_BACKBONES, Backbone, is_demo, load_backbone
from lamella.lab.data.task import Task
from lamella.texts.collating import Collator

__all__ = [
    "KNOWN_BACKBONES",
    "KNOWN_TASKS",
    "Backbone",
    "Collator",
    "Encoded",
    "Task",
    "encode",
    "is_demo",
    "load_backbone",
    "load_task",
]
