"""How much a classifier's answer depends on single patches: corruptions, attacks, occlusion, and what helps."""
