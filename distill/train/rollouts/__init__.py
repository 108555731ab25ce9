"""Learning from the student's own text: rollouts, their rewards, what proves and watches them."""
