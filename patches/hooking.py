"""The one lock under which hooks are put on and taken off."""

from __future__ import annotations

import threading

hooking = threading.Lock()  # registering and removing hooks is not atomic
