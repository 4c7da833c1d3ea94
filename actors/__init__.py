"""The actor system: planners and generators as Ray actors. The library itself (:mod:`crsm`) never imports Ray.

===================  ====================================================================================
``cluster``          connects to a Ray cluster or starts a local one
``reachability``     why there is no cluster at an address, in a moment
``job_environment``  what a submitted job can know of itself: no Ray
``weights``          a checkpoint as a message
``scheduling``       who gets a batch, what is shed, what a failure means: pure, no Ray
``planner``          the actor that deliberates
``pool``             many planners as one: a dispatcher thread and its queues
``records``          requests and plans as bytes: pure, no Ray
``link``             shared memory and a socket between a generator and its pool: no Ray
``mailbox``          the pool as the engine sees it, at the generator's end of a link: no Ray
``bridge``           the pool's end: no Ray
``pool_actor``       the pool in an actor of its own, and who starts it again
``decode_loop``      the engine in a thread of its own: no Ray
``generator``        the actor that decodes
``rollouts``         a fleet of actors that answers problems, for training
===================  ====================================================================================
"""
