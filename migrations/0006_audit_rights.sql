-- Whoever owns the audit log may only add to it, too: that is the application itself where no other role migrates.
-- An owner can grant the right to itself again; that takes intent, and the trigger and the chain are still there.

REVOKE UPDATE, DELETE, TRUNCATE ON audit_events FROM CURRENT_USER;
