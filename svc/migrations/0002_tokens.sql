-- Who may ask. A token itself is stored nowhere.
CREATE TABLE tokens (
    name           text CONSTRAINT tokens_pkey PRIMARY KEY,
    hash           text NOT NULL,  -- SHA-256 of the token, in hexadecimal
    role           text NOT NULL,
    application_id ulid,  -- NULL: of all applications
    created_at     timestamptz NOT NULL DEFAULT now(),
    expires_at     timestamptz,
    CONSTRAINT tokens_hash_key UNIQUE (hash),
    CONSTRAINT tokens_name_check CHECK (name ~ '^[A-Za-z0-9._@-]{1,64}$'),
    CONSTRAINT tokens_role_check CHECK (role IN ('read', 'write')),
    CONSTRAINT tokens_application_id_fkey
        FOREIGN KEY (application_id) REFERENCES applications (id) ON DELETE CASCADE
);
