"""The parts of self-distillation: a student learns the assignments that its teacher makes of other views."""
