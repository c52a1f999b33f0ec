"""What threads that use one model share."""

import threading

hooking = threading.Lock()  # registering and removing hooks is not atomic
