"""Speaker verification and speech separation."""
