"""Steps that several verbs take, and the long ones of a build."""
