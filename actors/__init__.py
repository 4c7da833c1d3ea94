"""The actor system: planners and generators as Ray actors. The library itself (:mod:`crsm`) never imports Ray.

===================  ====================================================================================
``cluster``          connects to a Ray cluster or starts a local one
``weights``          a checkpoint as a message
``scheduling``       who gets a batch, what is shed, what a failure means: pure, no Ray
``planner``          the actor that deliberates
``pool``             planners as the engine sees them: a dispatcher thread and a mailbox
``decode_loop``      the engine in a thread of its own: no Ray
``generator``        the actor that decodes
``rollouts``         a fleet of actors that answers problems, for training
===================  ====================================================================================
"""
