"""Update rules, which decide when ranks combine what they have learned: one file per rule."""
