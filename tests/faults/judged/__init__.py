"""What the referee kills: trainers, and the process that starts them fast."""
