"""Tuning tables: measured times of every way to run a site on this machine, looked up when a strategy is chosen."""

from fusion_core.tables.machine import Machine, refusal
from fusion_core.tables.schema import TableError
from fusion_core.tables.store import Found, find, path_for, save
from fusion_core.tables.table import UNFUSED, Row, Table

__all__ = ["UNFUSED", "Found", "Machine", "Row", "Table", "TableError", "find", "path_for", "refusal", "save"]
