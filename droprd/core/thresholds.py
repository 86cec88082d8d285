"""From which value on something is worth a warning, or critical: the [health] of a configuration.

Plain values with their defaults, in a module of their own because every process reads the settings
and few judge health. Ages are seconds, sizes bytes. 0 means never.
"""

from __future__ import annotations

from dataclasses import dataclass

from droprd.model import MIB


@dataclass(frozen=True, slots=True)
class Thresholds:
    """What `droprd.core.health.judge` holds a node against.

    Attributes:
        oldest_age: of the oldest message that waits for a peer.
        silence: since a peer last took anything although something waits for it.
        merge_age: since the sender last took messages out of journals although some lie there.
        inbox_age: of the oldest message of a channel that no application has settled.
        free_bytes: left on the disk of the spool; here less is worse.
        full_in: until that disk is full at the present rate; here less is worse.
        dead_letters: how many there are.
        failures_critical: failures of a worker in a row that are more than an accident.
    """

    oldest_age_warning_s: float = 15 * 60
    oldest_age_critical_s: float = 4 * 3600
    silence_warning_s: float = 15 * 60
    silence_critical_s: float = 4 * 3600
    merge_age_warning_s: float = 15
    merge_age_critical_s: float = 45
    inbox_age_warning_s: float = 3600
    inbox_age_critical_s: float = 24 * 3600
    free_bytes_warning: int = 512 * MIB
    free_bytes_critical: int = 64 * MIB
    full_in_warning_s: float = 4 * 3600
    full_in_critical_s: float = 30 * 60
    dead_letters_warning: int = 1
    dead_letters_critical: int = 0
    failures_critical: int = 5
