"""The deterministic simulator: the real coordinator and the real site agents under seeded faults, in virtual time."""
